"""Embedded AlgoPerf workloads on real data out of installed packages, and the runner that trains on them.

A workload is a folder: `task.py` (data, sizes, loss, targets, batch size, budget) and one model file per framework,
`pytorch.py` and `jax.py`. `registry` finds it there.
"""
