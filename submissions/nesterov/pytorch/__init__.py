"""Nesterov momentum in PyTorch."""
