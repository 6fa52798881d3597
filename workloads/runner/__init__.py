"""The parts of the runner: flags, tuning, the training loop, logs, checkpoints, progress."""
