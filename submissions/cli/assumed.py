"""Speeds of devices that nobody could measure here: assumptions, each from a published figure, for plans alone.

`plan --calibrate` on the device itself takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from algoperf_kfac.seconds import Speed

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)

# NVIDIA's data sheet of the A100 with 40 GB: TF32, which AlgoPerf 1.0 switches on, and the memory's bandwidth.
A100_FLOPS, A100_BYTES = 156e12, 1.555e12
# What is assumed to be reached of either, and the least time of any operation.
REACHED_FLOPS, REACHED_BYTES, LAUNCH = 0.5, 0.7, 1e-5
# jax-ml/jax issue 10180: 16 eigendecompositions of 1,024 rows in float32 took a V100 0.90 s, one after the other.
MEASURED_SIZE, MEASURED_SECONDS = 1024, 0.90 / 16
# FlagGems pull request 5586: torch.linalg.qr with mode="r" of 1,024 rows in float32 took an NVIDIA GPU 4 ms, of
# 4,096 rows 24 to 32 ms.
REFLECTIONS_SECONDS, REFLECTIONS_POWER = 4e-3, 1.5


def a100() -> Speed:
    """An A100 with 40 GB, on four assumptions.

    Products run at half of the peak with TF32; the few that a refresh makes, without it, are taken for such. One
    eigendecomposition of 1,024 rows takes what it took on a V100, and others grow as the square of their size:
    between time that goes into starting kernels, a few for each row, and into arithmetic, which grows as the cube.
    An inverse by the Cholesky root takes a tenth of that. A step of orthogonal iteration takes Householder's
    reflections, made as fast as on another GPU, their product, as long again, and two products of matrices.
    """

    def decomposition(n: int) -> float:
        return max(LAUNCH, MEASURED_SECONDS * (n / MEASURED_SIZE) ** 2)

    def product(n: int) -> float:
        return max(LAUNCH, 2 * n**3 / (REACHED_FLOPS * A100_FLOPS))

    def iteration(n: int) -> float:
        reflections = max(LAUNCH, REFLECTIONS_SECONDS * (n / MEASURED_SIZE) ** REFLECTIONS_POWER)
        return 2 * reflections + 2 * product(n)

    return Speed(
        "an A100 of 40 GB by assumption",
        products={n: product(n) for n in SIZES},
        decompositions={n: decomposition(n) for n in SIZES},
        iterations={n: iteration(n) for n in SIZES},
        inverses={n: decomposition(n) / 10 for n in SIZES},
        bytes_per_second=REACHED_BYTES * A100_BYTES,
    )


DEVICES: Mapping[str, Callable[[], Speed]] = {"a100": a100}
"""By the name that `plan --assume` takes."""
