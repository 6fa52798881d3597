"""Measurements: speed, experiments, and every submission on AlgoPerf's own workloads."""
