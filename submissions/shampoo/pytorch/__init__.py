"""Distributed Shampoo in PyTorch."""
