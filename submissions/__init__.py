"""AlgoPerf submissions: a folder for each, with `pytorch/submission.py` and `jax/submission.py`."""
