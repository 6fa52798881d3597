"""Schedule-free AdamW in JAX."""
