"""Muon in PyTorch."""
