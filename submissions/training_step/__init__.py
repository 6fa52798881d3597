"""What every submission shares: the gradient of a step, clipping, logging, hyperparameters, batch sizes."""
