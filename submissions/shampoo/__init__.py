"""Distributed Shampoo: PyTorch alone has it."""
