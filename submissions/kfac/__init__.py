"""What kfac_expand and kfac_reduce share: everything but the approximation."""
