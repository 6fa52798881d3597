"""A click model with one embedding table on flights that arrive late: neither positions nor weight sharing."""
