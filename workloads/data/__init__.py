"""Data of the embedded workloads as NumPy arrays: no framework is imported here."""
