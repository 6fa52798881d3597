"""Models of other people at tiny sizes, and what K-FAC makes of them: `python -m benchmarks.zoo`."""
