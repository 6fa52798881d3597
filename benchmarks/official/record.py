"""What a case is run with, and what it found."""

from __future__ import annotations

import dataclasses

SUBMISSIONS = ("nadamw", "kfac_expand", "kfac_reduce")
STEPS = 5
RESUME_AT = 2
INTERVAL = 3  # statistics and refresh at steps 0 and 3
# Where G^T A is compared with the gradient. Not at step 0: while a head or the last scale of each residual block is
# still zero, as in imagenet_vit and the ResNets, most layers have no gradient, and any capture would do.
CHECK_AT = INTERVAL
# No warm-up: the official horizons are so long that five steps of one would not move. No clipping: the gradient is
# compared with the captured one. Everything else is the submission's own point.
POINT: dict[str, float | None] = {
    "learning_rate": 1e-4,
    "warmup_factor": 0.0,
    "horizon_factor": 1.0,
    "grad_clip": None,
}
KFAC_POINT: dict[str, float | None] = {
    "factor_interval": INTERVAL,
    "refresh_interval": INTERVAL,
    "initial_statistics": 1,
}
# AlgoPerf's runner compiles it, but at torch 2.13 inductor cannot on a CPU, whatever the submission and the image
# size ("cannot determine truth value of Relational").
NOT_COMPILED = ("fastmri",)
# Variants that AlgoPerf itself cannot build: `init_model_fn` raises before any submission is asked, with this text.
BROKEN = {
    # Its Encoder1DBlock calls what its dropout returns.
    ("imagenet_vit_post_ln", "jax"): "TypeError: 'DynamicJaxprTracer' object is not callable",
}


@dataclasses.dataclass
class Record:
    """What a case found.

    Attributes:
        data_parallel: the PyTorch model was wrapped in DataParallel.
        max_factor_dim: K-FAC's, where it was not the submission's own.
        devices: that JAX saw and split the batch over.
        losses: of the repeated batch in training mode, one for each step, before its update; and, last, after all
            steps in evaluation mode, where batch normalisation makes it another quantity.
        seconds: of a "plain" step (the fastest), the "first_plain" one (with compilation), a "statistics" step (the
            fastest, with the refresh), its eigendecompositions alone ("decompositions"), an "evaluation", a
            "checkpoint".
        covered, parameters: of the model.
        layers: that K-FAC covers.
        fallbacks: parameters it does not cover, with the reason.
        uncovered_later: layers that were declared and then moved to the fallback, with the reason (in JAX none can:
            all of them are known before the first step).
        counters: the optimizer's own, after the last step.
        gradient_errors, rounding_bounds: layer -> error of G^T A against its gradient at step `CHECK_AT`, and how
            large float32 alone may make it, see `gradient_check` and `gradient_check_jax`.
        convolution_errors: layer -> how far its gradient, formed again from what was captured, is from the
            gradient in float32, and from G^T A in float64; of convolutions in PyTorch, see `gradient_check`.
        algoperf: its version, 1.0 or what was before.
        environment: the versions of it and other packages, see `environment.versions`; "" in earlier records.
        compiled: the model was compiled by the runner.
        note: what K-FAC's coverage says of the statistics steps of such a model; "" in earlier records.
        unoptimized: JAX compiled its programs with JAX_DISABLE_MOST_OPTIMIZATIONS: quickly, for slow steps.
        resumed: the resumed run began at the checkpoint's step and ended in the same bits.
        restore_error: what AlgoPerf's own restore raised, if it did.
        peak_rss_mb: of the whole process.
        total_seconds: of the whole process but its imports.
    """

    workload: str
    framework: str
    submission: str
    data_parallel: bool = False
    max_factor_dim: int | None = None
    devices: int = 1
    steps: int = STEPS
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    covered: int = 0
    parameters: int = 0
    layers: list[str] = dataclasses.field(default_factory=list)
    fallbacks: dict[str, str] = dataclasses.field(default_factory=dict)
    uncovered_later: dict[str, str] = dataclasses.field(default_factory=dict)
    counters: dict[str, float] = dataclasses.field(default_factory=dict)
    gradient_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    rounding_bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    convolution_errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    algoperf: str = "0.6"
    environment: str = ""
    compiled: bool = False
    note: str = ""
    unoptimized: bool = False
    resumed: bool = False
    restore_error: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    peak_rss_mb: float = 0.0
    total_seconds: float = 0.0


@dataclasses.dataclass
class Failure:
    """A case that gave no record."""

    workload: str
    framework: str
    submission: str
    reason: str
