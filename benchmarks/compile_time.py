"""What compiling K-FAC in JAX costs beside compiling NadamW.

    OMP_NUM_THREADS=1 python -m benchmarks.compile_time --models=mlp,blocks_2,scan_16

For each model the CPU seconds of everything that is traced and compiled: of NadamW (`optax.nadamw`) its `init` and
its step, of K-FAC the constructor, `init`, and the steps with and without statistics. Each is measured in a process
of its own, so that nothing is there from the one before, but for what JAX_COMPILATION_CACHE_DIR holds where that is
set. `--out=docs/generated/compile_time.md` keeps the table.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from commands import errors
from commands.arguments import Parser
from commands.atomic import write_text
from commands.errors import UserError, tell

OPTIMIZERS = ("nadamw", "expand", "reduce")
EXAMPLES, POSITIONS, WIDTH, HEADS, WORDS = 8, 8, 32, 2, 32  # small: what is compiled hardly depends on sizes


def mlp() -> tuple[Any, jax.Array]:
    """Three linear layers, and inputs."""
    from flax import linen as nn

    return nn.Sequential([nn.Dense(WIDTH), nn.relu, nn.Dense(WIDTH), nn.relu, nn.Dense(WORDS)]), jax.numpy.ones(
        (EXAMPLES, WIDTH)
    )


def language_model(count: int, *, scan: bool) -> tuple[Any, jax.Array]:
    """Transformer blocks, one by one or as a scan over a stack of them, and tokens."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
            h = nn.LayerNorm()(x)
            mask = nn.make_causal_mask(jax.numpy.ones(x.shape[:2]))
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(h, h, mask=mask)
            h = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
            return x + nn.Dense(WIDTH)(h), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = nn.Embed(WORDS, WIDTH)(tokens)
            if scan:
                blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=count)
                x, _ = blocks()(x, None)
            else:
                for _ in range(count):
                    x, _ = Block()(x)
            return nn.Dense(WORDS)(nn.LayerNorm()(x))

    return Model(), jax.random.randint(jax.random.key(0), (EXAMPLES, POSITIONS), 0, WORDS)


def model_of(name: str) -> tuple[Any, jax.Array]:
    """The model "mlp", "blocks_N" or "scan_N", and its inputs.

    Raises:
        UserError: there is no such model.
    """
    kind, _, count = name.partition("_")
    if name == "mlp":
        return mlp()
    if kind in ("blocks", "scan") and count.isdecimal() and int(count):
        return language_model(int(count), scan=kind == "scan")
    raise UserError(f"There is no model '{name}'. Known: mlp, blocks_N and scan_N with a number of blocks N.")


def measure(model_name: str, optimizer_name: str) -> dict[str, float]:
    """CPU seconds by part."""
    import optax

    model, inputs = model_of(model_name)
    params = jax.block_until_ready(model.init(jax.random.key(1), inputs)["params"])
    targets = jax.numpy.zeros(inputs.shape if inputs.ndim == 2 and model_name != "mlp" else EXAMPLES, int)
    spent: dict[str, float] = {}

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        outputs: jax.Array = model.apply({"params": params}, inputs)
        return outputs

    def loss_of(outputs: jax.Array, *_: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    def timed(part: str, make: Callable[[], Any]) -> Any:
        start = time.process_time()
        made = jax.block_until_ready(make())
        spent[part] = time.process_time() - start
        return made

    def compiled(part: str, step: Callable[..., Any], *args: Any) -> None:
        timed(part, lambda: jax.jit(step).lower(*args).compile() and None)

    def plain_gradient(params: Any, inputs: jax.Array) -> Any:
        return jax.grad(lambda params: loss_of(apply(params, inputs)))(params)

    if optimizer_name == "nadamw":
        transformation = optax.nadamw(1e-2)
        state = timed("init", lambda: transformation.init(params))

        def nadamw_step(params: Any, state: Any, inputs: jax.Array) -> Any:
            updates, state = transformation.update(plain_gradient(params, inputs), state, params)
            return optax.apply_updates(params, updates), state

        compiled("step", nadamw_step, params, state, inputs)
        return spent

    from algoperf_kfac.jax import KFAC

    def make() -> list[KFAC]:
        return [KFAC(apply, loss_of, params, inputs, approximation=optimizer_name, learning_rate=1e-2)]

    start = time.process_time()
    optimizer = make()[0]
    spent["constructor"] = time.process_time() - start
    state = timed("init", lambda: optimizer.init(params))

    def step(params: Any, state: Any, inputs: jax.Array) -> Any:
        updates, state = optimizer.update(plain_gradient(params, inputs), state, params)
        return optax.apply_updates(params, updates), state

    def statistics_step(params: Any, state: Any, inputs: jax.Array) -> Any:
        _, gradient, statistics = optimizer.value_grad_and_statistics(params, inputs)
        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    compiled("statistics step", statistics_step, params, state, inputs)
    compiled("step", step, params, state, inputs)
    return spent


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.compile_time", __doc__)
    parser.add_argument("--models", default="mlp,blocks_2,blocks_16,scan_16", help="comma-separated")
    parser.add_argument("--out", help="a file that gets the table")
    return errors.run(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    names = args.models.split(",")
    for name in names:
        model_of(name)
    lines = ["| model | optimizer | parts, CPU s | all, CPU s | ratio |", "|---|---|---|---|---|"]
    tell("\n".join(lines))
    for name in names:
        base = 0.0
        for optimizer in OPTIMIZERS:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                spent = pool.submit(measure, name, optimizer).result()
            total = sum(spent.values())
            base = base or total
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in spent.items())
            lines.append(f"| {name} | {optimizer} | {parts} | {total:.1f} | {total / base:.2f} |")
            tell(lines[-1])
    if args.out:
        head = (
            "# What compiling K-FAC costs in JAX\n\nWritten by `python -m benchmarks.compile_time "
            f"--models={args.models} --out=...` at jax {jax.__version__}; the module says how it is measured. "
            "Ratios are to NadamW's on the same model.\n\n"
        )
        write_text(Path(args.out), head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
