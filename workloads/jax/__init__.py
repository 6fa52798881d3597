"""What the workloads share in JAX."""
