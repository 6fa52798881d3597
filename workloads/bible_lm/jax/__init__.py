"""The JAX part of bible_lm."""
