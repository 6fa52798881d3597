"""Whole pages built once, as HTML and Markdown, and the files written beside them."""
