"""The one class of errors the package raises at its users."""

from __future__ import annotations


class InputError(Exception):
    """What a user can mend: the message names the thing and the remedy; a command shows it as one line."""
