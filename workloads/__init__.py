"""Embedded AlgoPerf workloads on real data out of installed packages, and the runner that trains on them."""
