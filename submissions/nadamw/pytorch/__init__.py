"""NadamW in PyTorch."""
