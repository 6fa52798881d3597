"""The commands `python -m submissions plan` and `python -m submissions export`."""
