"""How much damping, and what a factor wrong by R does to it (open question 3 of arXiv 2311.00636)."""
