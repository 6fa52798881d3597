"""Comparisons over many trials: suites, what they choose, targets, archives."""
