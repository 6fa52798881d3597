"""Experiments on the algorithm: variants against a base on paired seeds, each recorded, also those that failed."""
