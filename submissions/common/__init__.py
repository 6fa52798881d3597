"""What every submission shares: AlgoPerf's API, a step's gradient, schedule, hyperparameters, batch sizes."""
