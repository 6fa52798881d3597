"""What the optimizers keep between steps, in bytes, as counted by hand for each form of preconditioner."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.frameworks import EVERY_STEP, NAMES, start
from tests.contract.models import perceptron

# Entries of all blocks (b x b), of their eigenvalues (b), of the weights with biases.
SQUARES, VALUES, WEIGHTS = 65**2 + 96**2 + 97**2 + 10**2, 65 + 96 + 97 + 10, 65 * 96 + 97 * 10


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("options", "in_pytorch", "in_jax"),
    [
        # Averages, operators, and bases only where something reads them again; PyTorch shows eigenvalues, too.
        ({}, 2 * SQUARES + VALUES, 2 * SQUARES),
        ({"drift_tolerance": 0.1}, 3 * SQUARES + VALUES, 3 * SQUARES + VALUES),
        ({"scaling": "second_moment"}, 2 * SQUARES + VALUES + WEIGHTS, 2 * SQUARES + VALUES + WEIGHTS),
        ({"preconditioner": "inverse"}, 2 * SQUARES, 2 * SQUARES),
    ],
    ids=["power", "drift", "second_moment", "inverse"],
)
def test_what_is_kept(framework: str, options: dict[str, Any], in_pytorch: int, in_jax: int) -> None:
    """Beside the moments, and a few counts per layer."""
    run = start(framework, perceptron((64, 96, 10)), dtype="float32", **EVERY_STEP, **options)
    if framework == "pytorch":  # in JAX all is there before the first step
        run.step()
    expected = 4 * (in_pytorch if framework == "pytorch" else in_jax)
    assert 0 <= run.kfac_bytes() - expected < 200
