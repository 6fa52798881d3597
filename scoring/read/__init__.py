"""From directories and archives to one tidy table of evaluations: nothing is judged here."""
