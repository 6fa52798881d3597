"""What the tools know of AlgoPerf: whether it is here, its workloads and variants, the extents of their batches."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from commands.errors import UserError
from submissions.common.batch_sizes import SCORED, UNSCORED

WORKLOADS = (*SCORED, *UNSCORED)
FROM_1_0 = "finewebedu_lm"  # the one that older versions do not have
# Other activations, normalisations and sizes, from version 0.5 on.
VARIANTS = (
    "criteo1tb_test",
    "criteo1tb_layernorm",
    "criteo1tb_embed_init",
    "criteo1tb_resnet",
    "fastmri_model_size",
    "fastmri_tanh",
    "fastmri_layernorm",
    "imagenet_resnet_silu",
    "imagenet_resnet_gelu",
    "imagenet_resnet_large_bn_init",
    "imagenet_vit_glu",
    "imagenet_vit_post_ln",
    "imagenet_vit_map",
    "librispeech_conformer_attention_temperature",
    "librispeech_conformer_layernorm",
    "librispeech_conformer_gelu",
    "librispeech_deepspeech_tanh",
    "librispeech_deepspeech_no_resnet",
    "librispeech_deepspeech_norm_and_spec_aug",
    "ogbg_gelu",
    "ogbg_silu",
    "ogbg_model_size",
    "wmt_post_ln",
    "wmt_attention_temp",
    "wmt_glu_tanh",
)
# Which workloads the runner compiles in PyTorch, and which in addition from 1.0 on.
COMPILED = ("cifar", "fastmri", "imagenet_resnet", "mnist", "wmt")
COMPILED_FROM_1_0 = ("finewebedu_lm", "imagenet_vit")
OLDER = "The AlgoPerf installed here is older than 1.0: without finewebedu_lm, and with other budgets than 1.0's."
NOT_INSTALLED = "AlgoPerf is not installed here; docs/official.md says how to make an environment with it"


class Budget(NamedTuple):
    """What AlgoPerf 1.0 allows a run.

    Attributes:
        seconds: of the external ruleset; the self-tuning one allows `SELF_TUNING` times as many.
        step_hint: steps that its own baseline makes in them.
    """

    seconds: int
    step_hint: int

    @property
    def per_step(self) -> float:
        """Seconds a step may take for the hint's steps to fit."""
        return self.seconds / self.step_hint


SELF_TUNING = 1.5
BUDGETS = {
    "criteo1tb": Budget(8_915, 10_666),
    "fastmri": Budget(2_745, 18_094),
    "finewebedu_lm": Budget(31_967, 72_000),
    "imagenet_resnet": Budget(49_918, 195_999),
    "imagenet_vit": Budget(64_292, 167_999),
    "librispeech_conformer": Budget(43_680, 76_000),
    "librispeech_deepspeech": Budget(36_949, 38_400),
    "ogbg": Budget(11_303, 52_000),
    "wmt": Budget(16_114, 120_000),
}

# Training batches, beside the number of examples.
AUDIO_SAMPLES = 320_000  # 20 seconds at 16 kHz, what utterances are padded to
SENTENCE = 256  # tokens of a packed row
DOCUMENT = 1024  # tokens of a row of the language model
GRAPH_NODES, GRAPH_EDGES = 26, 56  # batches of molecules are padded to these averages


def installed() -> bool:
    """Whether AlgoPerf and its runner can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("algoperf", "submission_runner"))


def is_older() -> bool:
    """Whether the AlgoPerf that is installed is older than 1.0: without the language model.

    Not asked of its version, which an archive without tags does not know.
    """
    return installed() and importlib.util.find_spec(f"algoperf.workloads.{FROM_1_0}") is None


def version() -> str:
    """Of the AlgoPerf that is installed: what decides on workloads, budgets and what the runner compiles."""
    return "0.6" if is_older() else "1.0"


def compiled(version: str) -> tuple[str, ...]:
    """The base workloads whose PyTorch models the runner of a version compiles."""
    return COMPILED if version == "0.6" else (*COMPILED, *COMPILED_FROM_1_0)


def here() -> tuple[str, ...]:
    """The base workloads that the installed AlgoPerf has."""
    return tuple(name for name in WORKLOADS if name != FROM_1_0 or not is_older())


def base_of(name: str) -> str:
    """The workload of which `name` is a variant, or `name` itself.

    Raises:
        UserError: none of AlgoPerf's.
    """
    for base in WORKLOADS:
        if name == base or name.startswith(f"{base}_"):
            return base
    raise UserError(f"no batch is known for workload '{name}'; known: {', '.join(WORKLOADS)} and their variants")


def graph_rows(graphs: int) -> dict[int, int]:
    """Rows of nodes and of edges in a batch of molecules -> the number of graphs, the padding graph included."""
    return {GRAPH_NODES * graphs + 1: graphs + 1, GRAPH_EDGES * graphs: graphs + 1}


def import_torchvision() -> None:
    """Imports torchvision, which some PyTorch workloads need for their data only, where it is installed.

    Beside a torch it was not built for (a CPU build of torch, say) its import stops at two operators that none of
    these workloads calls; declaring them is enough.
    """
    import torch

    if importlib.util.find_spec("torchvision") is None:
        return  # those that need it say so
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision  # noqa: F401


_KEPT: list[object] = []  # declarations go with the library object
