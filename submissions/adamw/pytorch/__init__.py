"""AdamW in PyTorch."""
