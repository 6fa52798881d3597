"""The submissions on AlgoPerf's own workloads: every case `benchmarks.official` can run, and the tool itself.

One command runs everything, in an environment that has AlgoPerf (`docs/official.md` says how to make one):

    python -m pytest tests/official

The tests import nothing of AlgoPerf themselves; those that need it are skipped where it is not installed.
"""
