"""What every case must show."""

from __future__ import annotations

import math

from benchmarks.official.record import NOT_COMPILED, STEPS, Record
from submissions.registry import is_kfac
from workloads.algoperf import base_of, compiled

# Share of the parameters in layers with a rule, in percent: at least this much must be covered, in both frameworks.
# What is left are scales and biases of norms, and query scalings; in criteo1tb the embedding, a lookup alone.
LEAST_COVERAGE = {
    "criteo1tb": 22.0,
    "fastmri": 99.9,
    "finewebedu_lm": 99.9,
    "finewebedu_lm_all_words": 99.9,
    "imagenet_resnet": 99.7,
    "imagenet_vit": 99.2,
    "librispeech_conformer": 99.3,
    "librispeech_deepspeech": 99.0,
    "ogbg": 99.7,
    "wmt": 97.0,
    "mnist": 100.0,
    "cifar": 99.9,
}
COMPILED_STATISTICS = "statistics steps run compiled"  # what K-FAC says where they do


def problems(record: Record) -> list[str]:
    """What a case should have shown and did not; empty if all is well."""
    losses, found = record.losses, []
    if len(losses) != STEPS + 1 or not all(map(math.isfinite, losses)) or losses[STEPS - 1] >= losses[0]:
        found.append(f"the loss is not finite and falling over {STEPS} steps: {losses}")
    if not record.resumed:
        found.append("the resumed run did not end in the same bits")
    base = base_of(record.workload)
    should_compile = (
        record.framework == "pytorch" and base in compiled(record.algoperf) and base not in NOT_COMPILED
    )
    if record.compiled != should_compile:
        found.append(f"compiled by the runner: {record.compiled}, expected {should_compile}")
    if record.framework == "jax" and "NoneType" not in (record.restore_error or ""):
        found.append(f"AlgoPerf's restore in JAX raised {record.restore_error!r}: does the detour need a change?")
    return found + (_problems_of_kfac(record) if is_kfac(record.submission, record.framework) else [])


def _problems_of_kfac(record: Record) -> list[str]:
    """Every declared layer received its statistics, and they are those of its gradient."""
    counters, found = record.counters, []
    if record.compiled and record.note and COMPILED_STATISTICS not in record.note:
        found.append(f"{record.note}; expected was: {COMPILED_STATISTICS}")
    expected = {"steps": STEPS, "failures": 0, "dropped": 0, "stand_ins": 0}
    if record.framework == "pytorch":
        expected["missed_layers"] = 0
    elif "missed_layers" in counters:
        # A layer that misses its statistics raises while the step is traced, before anything could be counted.
        found.append("JAX counts missed layers now: they are not looked at")
    for name, value in expected.items():
        if counters.get(name) != value:
            layers = {key: count for key, count in counters.items() if key.endswith(f"/{name}") and count}
            found.append(f"{name} is {counters.get(name)}, not {value}: {layers}")
    if not record.layers or set(record.gradient_errors) != set(record.layers):
        found.append(f"checked were {sorted(record.gradient_errors)}, covered are {sorted(record.layers)}")
    for layer in record.layers:
        if counters.get(f"{layer}/refreshes", 0) + counters.get(f"{layer}/skipped", 0) < 1:
            found.append(f"{layer} was neither refreshed nor knowingly skipped")
    for layer, error in record.gradient_errors.items():
        bound = record.rounding_bounds[layer]
        if not bound > 0:
            found.append(f"{layer} has no gradient: its error says nothing")
        if not error < 1e-4 + bound and not _formed_of_the_captured(record, layer):
            found.append(f"{layer}: G^T A is off the gradient by {error:.2e}, float32 allows {bound:.2e}")
    found += [f"{name} takes the fallback without a reason" for name, why in record.fallbacks.items() if not why]
    covered = 100 * record.covered / record.parameters
    if covered < LEAST_COVERAGE.get(record.workload, 0):
        found.append(f"covered are {covered:.2f} % of the parameters")
    if record.workload == "criteo1tb":
        others = [name for name in record.fallbacks if not name.startswith("embedding_")]
        found += [f"{name} takes the fallback, and is no embedding" for name in others]
    return found


def _formed_of_the_captured(record: Record, layer: str) -> bool:
    """A convolution's gradient is what float32 makes of what was captured, however many digits that loses.

    PyTorch's own backward pass gives the gradient again in float32, up to a rounding of it, and G^T A in float64.
    """
    if layer not in record.convolution_errors:
        return False
    single, double = record.convolution_errors[layer]
    return single < 1e-6 and double < 1e-9
