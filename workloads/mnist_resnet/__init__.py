"""A residual network with batch norm that classifies noisy MNIST images: convolutions, one label an image."""
