"""Schedule-free AdamW in PyTorch."""
