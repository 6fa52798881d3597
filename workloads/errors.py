"""The one exception that stands for a user's mistake: shown as a single line, never as a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: the message names the thing and the remedy, in one line."""
