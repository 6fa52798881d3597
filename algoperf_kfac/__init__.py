"""K-FAC-expand and K-FAC-reduce for layers that share their weight over positions (arXiv 2311.00636)."""

__version__ = "0.1.0"
