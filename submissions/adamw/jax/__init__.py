"""AdamW in JAX."""
