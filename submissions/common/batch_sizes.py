"""AlgoPerf's workloads, and the one thing a submission may choose by their names: its global batch size."""

from __future__ import annotations

from collections.abc import Callable

# Scored by the benchmark, the language model from version 1.0 on; the sizes are those of AlgoPerf's own NadamW.
SCORED = {
    "criteo1tb": 262_144,
    "fastmri": 32,
    "finewebedu_lm": 64,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "ogbg": 512,
    "wmt": 128,
}
# For development.
UNSCORED = {
    "mnist": 1024,
    "cifar": 128,
}
# Variants for which AlgoPerf's baselines take other sizes than for the base workload.
VARIANTS = {
    "imagenet_resnet_silu": 512,
    "imagenet_resnet_gelu": 512,
    "imagenet_vit_glu": 512,
}
_SIZES = SCORED | VARIANTS | UNSCORED
# Where workloads that are not AlgoPerf's are trained, whoever has them says their sizes: functions of a name that
# return None for one they do not know.
_OTHERS: list[Callable[[str], int | None]] = []


def get_batch_size(workload_name: str) -> int:
    """The global batch size.

    Raises:
        ValueError: unknown workload; the runner then asks again with the name of the base workload.
    """
    known = (_SIZES.get(workload_name), *(size_of(workload_name) for size_of in _OTHERS))
    for size in known:
        if size is not None:
            return size
    raise ValueError(f"no batch size for workload '{workload_name}'; known: {', '.join(_SIZES)}")


def ask_also(size_of: Callable[[str], int | None]) -> None:
    """Lets `get_batch_size` ask for workloads that are not AlgoPerf's, too."""
    _OTHERS.append(size_of)
