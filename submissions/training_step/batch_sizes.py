"""Global batch sizes: the one thing a submission may choose by workload."""

from __future__ import annotations

_BATCH_SIZES = {
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "ogbg": 512,
    "wmt": 128,
    # Variants for which AlgoPerf's baselines take other sizes than for the base workload.
    "imagenet_resnet_silu": 512,
    "imagenet_resnet_gelu": 512,
    "imagenet_vit_glu": 512,
    # AlgoPerf's development workloads.
    "mnist": 1024,
    "cifar": 128,
    # The embedded workloads of this repository.
    "mnist_vit": 128,
    "bible_lm": 64,
}


def get_batch_size(workload_name: str) -> int:
    """The global batch size.

    Raises:
      ValueError: unknown workload; the runner then asks again with the name of the base workload.
    """
    if workload_name not in _BATCH_SIZES:
        raise ValueError(f"no batch size for workload '{workload_name}'; known: {', '.join(_BATCH_SIZES)}")
    return _BATCH_SIZES[workload_name]
