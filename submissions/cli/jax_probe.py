"""Sees a JAX model as a submission would train it; the library does the seeing."""

from __future__ import annotations

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Sighting
from algoperf_kfac.jax import probe as library
from algoperf_kfac.jax.probe import Subject, plan_of
from commands.errors import UserError

__all__ = ["Subject", "plan_of", "sight"]


def sight(subject: Subject, config: KFACConfig) -> Sighting:
    """A statistics step of a submission on the model, traced.

    Args:
        subject: the model.
        config: the submission's.

    Raises:
        UserError: the model cannot be traced.
    """
    try:
        return library.sight(subject, config)
    except ValueError as error:
        raise UserError(str(error)) from error
