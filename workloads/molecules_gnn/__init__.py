"""A graph network that reads a label out of each molecule: the reduce setting, over graphs of different size."""
