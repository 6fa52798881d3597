"""Muon in JAX."""
