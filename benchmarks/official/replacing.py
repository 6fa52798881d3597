"""A look into code that has no seam for it: another value for an attribute, while a context lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of a module, class or object, and puts back what was there, on errors too.

    Args:
        owner: whose attribute it is; one it inherits is covered and not changed.
        name: of the attribute.
        value: in its place.
    """
    is_own = name in vars(owner)
    original = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
