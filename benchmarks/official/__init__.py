"""The submissions on AlgoPerf's own workloads, inside its own training loop: the tool behind docs/official.md.

A single case, as JSON, and the table of many, in an environment that has AlgoPerf:

    python -m benchmarks.official.case --workload=ogbg --framework=pytorch --submission=kfac_reduce
    python -m benchmarks.official.table --out=docs/official.md

Every case is a process of its own, so that its peak memory is its own.
"""
