"""The PyTorch part of bible_lm."""
