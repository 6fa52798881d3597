"""Weight decay by marginal likelihood: the paper's third experiment, small, on embedded images."""
