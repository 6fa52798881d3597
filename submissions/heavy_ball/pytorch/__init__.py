"""Heavy ball in PyTorch."""
