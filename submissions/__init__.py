"""AlgoPerf submissions: a folder per algorithm, with `pytorch/submission.py` (and later `jax/submission.py`)."""
