"""SOAP in PyTorch."""
