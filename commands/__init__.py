"""What every command line of this repository shares: flags, one-line errors, files written whole."""
