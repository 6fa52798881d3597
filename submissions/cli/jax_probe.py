"""Sees a JAX model as a submission's K-FAC would; see `algoperf_kfac.jax.probe`."""

from __future__ import annotations

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Sighting
from algoperf_kfac.jax.probe import Subject, plan_of, sight
from submissions.kfac.defaults import DEFAULTS
from workloads.errors import UserError

__all__ = ["Subject", "plan_of", "probe"]


def probe(subject: Subject, submission: str) -> Sighting:
    """Trace the model once.

    Args:
        subject: the model.
        submission: "kfac_expand" or "kfac_reduce".

    Raises:
        UserError: it is no K-FAC submission, or the model cannot be traced.
    """
    approximation = submission.removeprefix("kfac_")
    if approximation not in DEFAULTS:
        raise UserError(f"{submission} is no K-FAC submission; plan kfac_expand or kfac_reduce")
    config = KFACConfig.from_hyperparameters(None, **DEFAULTS[approximation], approximation=approximation)
    try:
        return sight(subject, config)
    except ValueError as error:
        raise UserError(str(error)) from error
