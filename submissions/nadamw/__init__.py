"""NadamW, the first-order reference of AlgoPerf."""
