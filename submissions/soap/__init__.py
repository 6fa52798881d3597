"""SOAP: PyTorch alone has it."""
