"""The paper's claims at a glance: one figure for those who read nothing else."""
