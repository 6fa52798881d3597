"""How expand and reduce scale with the size of language models: exactly, on paper, and trained."""
