"""NadamW in JAX."""
