"""A conformer that tells who speaks in joined recordings, by CTC: sequences of varying length with paddings."""
