"""The submissions on AlgoPerf's own workloads, inside AlgoPerf's own training loop.

One command runs everything, in an environment that has AlgoPerf (`docs/official.md` says how to make one):

    python -m pytest tests/official

A single case, as JSON, and the table of many:

    python -m tests.official.case --workload=ogbg --framework=pytorch --submission=kfac_reduce
    python -m tests.official.table --out=docs/official.md

Every case is a process of its own, so that its peak memory is its own; the tests themselves import nothing of
AlgoPerf and are skipped where it is not installed.
"""
