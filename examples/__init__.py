"""Short programs around the library, each of a few seconds on a CPU: `python -m examples.NAME`."""
