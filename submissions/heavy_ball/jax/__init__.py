"""Heavy ball in JAX."""
