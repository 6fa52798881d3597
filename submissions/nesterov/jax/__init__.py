"""Nesterov momentum in JAX."""
