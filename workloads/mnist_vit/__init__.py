"""A vision transformer that classifies MNIST images: the reduce setting (one label for all positions)."""
