"""Negative controls: is it K-FAC's curvature that helps, or any basis, or one side of it?

    python -m benchmarks.controls --seeds=2

Trains each K-FAC submission's default point to its horizon and prints the validation metric there, beside controls
that differ in one thing: only A or only B applied, or the eigenvectors of both replaced by random orthogonal ones
with the same eigenvalues. NadamW over the same steps, with its best point on the workload, is the floor. The seeds
are not those of the race.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch import KFAC, NadamW
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Operators, Scaling, power
from commands import errors
from commands.arguments import Parser
from commands.errors import UserError
from submissions import registry as submissions
from submissions.common.api import Tree
from submissions.common.batch_sizes import get_batch_size
from submissions.common.pytorch import clip_gradient, compute_gradient
from submissions.common.schedule import learning_rate_factor
from workloads import registry, seeds

DEFAULTS: dict[str, Mapping[str, Tree]] = {
    name: submissions.describe(f"kfac_{name}", "pytorch").defaults for name in ("expand", "reduce")
}
KNOWN = {field.name for field in dataclasses.fields(KFACConfig)}
BEST = json.loads((Path(__file__).parents[1] / "tuning_search_spaces/nadamw_tuned.json").read_text())
BEST_POINT = {"bible_lm": BEST[0], "mnist_vit": BEST[1]}  # docs/results.md, tuning


class OnlyA(power.Scaling):
    """B taken as the identity."""

    def operators(self, state: LayerState) -> Operators:
        return super().operators(state)[0], []


class OnlyB(power.Scaling):
    """A taken as the identity."""

    def operators(self, state: LayerState) -> Operators:
        return [], super().operators(state)[1]


class RandomBasis(power.Scaling):
    """The eigenvalues in bases that have nothing to do with the factors."""

    def operators(self, state: LayerState) -> Operators:
        a, b = ([_orthogonal(u) for u in bases] for bases in (state.a_basis, state.b_basis))
        return self.powers(a, state.a_values), self.powers(b, state.b_values)


def _orthogonal(like: torch.Tensor) -> torch.Tensor:
    """A random orthogonal matrix, the same at every refresh."""
    generator = torch.Generator().manual_seed(like.shape[-1])
    return torch.linalg.qr(torch.randn(like.shape, generator=generator))[0].to(like)


CONTROLS: dict[str, type[Scaling]] = {
    "K-FAC": power.Scaling,
    "A only": OnlyA,
    "B only": OnlyB,
    "random basis": RandomBasis,
}


def train(
    workload_name: str, point: Mapping[str, Tree], steps: int, seed: int, control: type[Scaling] | None
) -> float:
    """The validation metric after `steps` steps; NadamW if there is no control."""
    workload = registry.load(workload_name, "pytorch")
    rng = seeds.root(seed)
    model, _ = workload.init_model_fn(rng)
    opt: KFAC | NadamW
    if control is None:
        betas = (1 - point["one_minus_beta1"], point["beta2"])
        opt = NadamW(model.parameters(), point["learning_rate"], betas, weight_decay=point["weight_decay"])
    else:
        config = KFACConfig(**{k: v for k, v in point.items() if k in KNOWN})
        opt = KFAC(model, config=config, scaling=control)
    queue = workload._build_input_queue(rng, "train", "", get_batch_size(workload_name))
    for step in range(steps):
        batch = next(queue)
        context = opt.capture() if isinstance(opt, KFAC) else None
        compute_gradient(workload, model, batch, None, rng, context=context, loss_type=workload.loss_type)
        clip_gradient(model.parameters(), point.get("grad_clip"))
        factor = learning_rate_factor(steps, 1.0, point["warmup_factor"], step)
        for group in opt.param_groups:
            group["lr"] = point["learning_rate"] * factor
        opt.step()
    count, batch_size = workload.num_validation_examples, workload.eval_batch_size
    metrics = workload._eval_model_on_split("validation", count, batch_size, model, None, rng, "")
    return float(metrics[workload.target_metric_name])


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.controls", __doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workloads", default=",".join(BEST_POINT), help="comma-separated names")
    parser.add_argument("--approximations", default=",".join(DEFAULTS), help="comma-separated")
    return errors.run(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    for name in args.workloads.split(","):
        if name not in BEST_POINT:
            known = ", ".join(BEST_POINT)
            raise UserError(f"No point of NadamW is recorded for workload '{name}'. Known: {known}.")
    print("| workload | statistics | steps | variant | metric: median (all seeds) |")
    print("|---|---|---|---|---|")
    for name in args.workloads.split(","):
        hint = registry.load(name, "pytorch").step_hint
        for approximation in args.approximations.split(","):
            point = DEFAULTS[approximation]
            steps = round(point["horizon_factor"] * hint)
            variants = [*CONTROLS.items(), ("NadamW", None)]
            for variant, control in variants:
                chosen = BEST_POINT[name] if control is None else point
                values = [train(name, chosen, steps, 2001 + s, control) for s in range(args.seeds)]
                shown = ", ".join(f"{v:.4f}" for v in values)
                median = statistics.median(values)
                print(f"| {name} | {approximation} | {steps} | {variant} | {median:.4f} ({shown}) |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
