"""A causal character-level language model on English text: the expand setting (a target per position)."""
