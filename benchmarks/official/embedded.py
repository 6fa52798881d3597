"""The embedded runner with the random numbers of AlgoPerf's, so that both can be compared exactly.

    python -m benchmarks.official.embedded [flags of workloads.run]

Both derive data, initialisation and steps from one seed, but by different generators; here the embedded one is
given AlgoPerf's.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence

import numpy as np

from benchmarks.official.replacing import replaced


def main(argv: Sequence[str]) -> int:
    """Runs `workloads.run` with AlgoPerf's derivation of seeds; returns its exit code."""
    import submission_runner  # defines the flag that AlgoPerf's generator reads
    from absl import flags
    from algoperf import random_utils as prng

    from workloads import run
    from workloads.runner import loop

    framework = next(word.split("=")[1] for word in argv if word.startswith("--framework="))
    flags.FLAGS(["runner", f"--framework={framework}"])
    assert submission_runner.FLAGS.framework == framework

    def root(seed: int) -> np.ndarray:
        rng: np.ndarray = prng.split(prng.PRNGKey(seed), 2)[0]  # as the runner does with the seed of a trial
        return rng

    official = types.SimpleNamespace(root=root, split=prng.split, fold_in=prng.fold_in)
    with replaced(loop, "seeds", official):
        return run.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
