"""What arXiv 2311.00636 claims, checked: each claim by a command that writes a page."""
