"""What the PyTorch parts of all workloads share."""
