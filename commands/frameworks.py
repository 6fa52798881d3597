"""The frameworks there are, and what to say where one is not installed."""

from __future__ import annotations

from commands.errors import UserError

FRAMEWORKS = {"pytorch": "PyTorch", "jax": "JAX"}  # by the names of AlgoPerf's flag
_EXTRAS = {"pytorch": "torch", "jax": "jax"}  # in pyproject.toml


def check(framework: str) -> None:
    """Raises UserError for a framework that is not there, with those that are."""
    if framework not in FRAMEWORKS:
        raise UserError(f"Unknown framework '{framework}'. Known: {', '.join(FRAMEWORKS)}.")


def missing(error: ModuleNotFoundError, framework: str) -> UserError:
    """What to raise where an import of a framework's module failed: the remedy."""
    extra = _EXTRAS.get(framework, framework)
    return UserError(
        f"The module '{error.name}' is not installed. Run: pip install -e '.[{extra},bench]' in the checkout."
    )
