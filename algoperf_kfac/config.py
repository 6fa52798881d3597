"""Every hyperparameter of the optimizer, validated in one place, free of any framework."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from algoperf_kfac.subset import RowLimit

APPROXIMATIONS = ("expand", "reduce", "mixed")
FISHERS = ("empirical", "mc", "exact")
PRECONDITIONERS = ("eigen", "inverse")
DECOMPOSITIONS = ("eigh", "qr")
POWERS = {"root": 0.5, "inverse": 1.0}  # scalings that are powers by name
DAMPING_MODES = ("relative", "absolute")
LARGE_FACTORS = ("block", "one_sided")
INITIAL_REFRESHES = ("doubling", "every")
LENGTHS = ("graft", "rms", "none")
POLAR_STEPS = 5  # of the Newton-Schulz iteration, see `algoperf_kfac.polar`
WHITENING = 0.5  # the power of the eigenvalues that scaling="polar" takes out of the momentum
DAMPING = 1e-2  # the default
LAYER_KINDS = ("linear", "conv", "conv_transpose")
TABLE = "embedding"  # the kind of a table that is the output layer, too: approximated like a linear layer


class Point(Protocol):
    """A point of a search space as AlgoPerf's runner hands it over: a namedtuple."""

    def _asdict(self) -> dict[str, object]: ...


@functools.cache
def scaling_names() -> tuple[str, ...]:
    """The scalings by name: "root" and "inverse" are powers, the others have a file in each framework."""
    files = Path(__file__).parent.glob("*/scalings/*.py")
    return tuple(sorted({path.stem for path in files if not path.stem.startswith("_")} | set(POWERS)))


@functools.cache
def kind_names() -> tuple[str, ...]:
    """The layer kinds that a configuration may name: the usual ones, and those with a file of their name."""
    files = Path(__file__).parent.glob("*/kinds/*.py")
    return (*LAYER_KINDS, *sorted({path.stem for path in files if not path.stem.startswith("_")}))


@dataclasses.dataclass(frozen=True)
class KFACConfig:
    """Hyperparameters, named as in AlgoPerf where a name exists there.

    Attributes:
        learning_rate: base learning rate; the schedule multiplies it.
        one_minus_beta1: 1 - decay of the momentum.
        beta2: decay of the second moment of the first-order update (fallback and length="graft") and, with
            `scaling="second_moment"`, of the rotated gradient.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        approximation: "expand", "reduce" (both as in the paper) or "mixed" (reduce where it fits: kernels over
            several positions take expand's A, and the identity stands for B where output gradients sum to zero over
            positions, see `vanishing.py`) for all layers, or a mapping from layer kind ("linear", "conv",
            "conv_transpose", or the name of a file in `kinds` that has layers of this kind) to one of them; kinds
            left out take "expand".
        fisher: "empirical" (gradients of the training loss), "mc" (labels sampled from the model) or "exact"
            (type-2, all columns of the output Hessian's root; small outputs only).
        fisher_samples: label samples per statistics step, for "mc".
        preconditioner: "eigen" (factors' eigenbases) or "inverse" (damped inverses, as in the paper).
        decomposition: for "eigen", how a refresh finds the bases: "eigh" (anew), or "qr" (by one step of orthogonal
            iteration from the bases before, as in SOAP, arXiv 2409.11321; Golub and Van Loan, Matrix Computations,
            section 8.2.4). The first bases of a layer, and those where that fails, are those of "eigh". "qr" takes
            less time, much less on a GPU, and its bases follow the factors with a delay.
        scaling: for "eigen", how the rotated momentum is scaled: "power" (by the eigenvalues to the power
            -`power`), "root" and "inverse" (the powers -1/2 and -1 by name), "second_moment" (Adam's second
            moment of the rotated gradient), "polar" (the polar factor of the whitened momentum, tempered by the
            eigenvalues to the power -`polar_exponent`), or a class of your own with the interface of the
            framework's `scalings.Scaling`.
        power: exponent for scaling="power", in (0, 1]; 1 is K-FAC's own, 1/2 Adam's in the eigenbasis.
        polar_exponent: exponent q for scaling="polar", in [0, 1]: D = B^-q polar(B^-1/2 M A^-1/2) A^-q; with 1/2
            the direction is the steepest in the norm that both factors make, with 0 it has singular values of 1.
        polar_steps: steps of the Newton-Schulz iteration for scaling="polar", which take most of the time of its
            directions; with fewer, small singular values of the whitened momentum stay smaller.
        damping: with "relative", lambda_A = damping tr(A)/P_in and lambda_B = damping tr(B)/P_out; with
            "absolute", lambda_A = pi sqrt(damping) and lambda_B = sqrt(damping)/pi with
            pi^2 = (tr(A)/P_in) / (tr(B)/P_out) (Martens and Grosse 2015, section 6.3).
        damping_mode: "relative" or "absolute".
        noise_floor: lambda_A and lambda_B are at least this multiple of the level below which rounding is scaled up
            to whole steps (`noise_level`); 0 for none. None is 1 with the default damping, and 0 with a damping of
            your own, which is taken as it is.
        factor_decay: decay of the moving averages of A and B per statistics step, bias-corrected.
        factor_interval: steps between statistics steps.
        statistics_rows: statistics are formed from as few examples of a batch, every n-th, as bring at least so
            many rows to the outer products of a call (positions with expand, examples with reduce), and from four
            at least, of which every k-th position is taken where all would be more rows than that; None for all
            examples. Layers whose rows are put together by segments take all.
        statistics_rows_by_side: whether layers with a diagonal block of more sides than `statistics_rows` take as
            many rows as that block has sides, so that none of their factors is singular for want of rows.
        initial_statistics: the first so many steps all take statistics, so that the first bases do not rest on
            one batch.
        refresh_interval: steps between refreshes of a layer's preconditioner, a multiple of factor_interval.
        initial_refreshes: which statistics steps refresh all layers until the first refresh interval is over: the
            first, second, fourth, eighth, ... ("doubling"), or "every" one.
        refresh_budget: the largest share of a run's time that refreshes may take, between 0 and 1. Where the clock
            finds them to take more (`pace.py`), `refresh_interval` is multiplied by a whole number, and the first
            steps refresh less often. None keeps the interval, and looks at no clock.
        drift_tolerance: with "eigen", a due refresh is skipped where the old basis still diagonalises the
            factor up to this share of its Frobenius norm; the eigenvalues are updated all the same.
        length: the length of a covered layer's direction: "graft" (the norm of its NadamW update), "rms" (such that
            the root mean square of its entries, bias included, is `length_factor`) or "none" (as the scaling gives
            it). Without "graft" the NadamW updates of covered layers are not needed: with "rms", in PyTorch with
            "none", too, no second moment of their parameters is kept. None is what `grafting` says.
        length_factor: root mean square for length="rms"; a step's is learning rate times schedule times this.
        grafting: by an older name, True for length="graft" and False for "none". None is what `length` says;
            neither given, directions are grafted. The two may not contradict each other.
        max_factor_dim: factors above this dimension take the form `large_factor`.
        large_factor: "block" (block diagonal, blocks of at most max_factor_dim) or "one_sided" (identity).

    Raises:
        ValueError: naming the hyperparameter, its value and what is allowed.
    """

    learning_rate: float = 1e-3
    one_minus_beta1: float = 0.1
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    approximation: str | Mapping[str, str] = "expand"
    fisher: str = "empirical"
    fisher_samples: int = 1
    preconditioner: str = "eigen"
    decomposition: str = "eigh"
    scaling: str | type = "power"
    power: float = 0.75
    polar_exponent: float = 0.125
    polar_steps: int = POLAR_STEPS
    damping: float = DAMPING
    damping_mode: str = "relative"
    noise_floor: float | None = None
    factor_decay: float = 0.9
    factor_interval: int = 10
    statistics_rows: int | None = None
    statistics_rows_by_side: bool = False
    initial_statistics: int = 10
    refresh_interval: int = 20
    initial_refreshes: str = "doubling"
    refresh_budget: float | None = None
    drift_tolerance: float = 0.0
    length: str | None = None
    length_factor: float = 0.5
    grafting: bool | None = None
    max_factor_dim: int = 1024
    large_factor: str = "block"

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ValueError(f"hyperparameter {name}={getattr(self, name)!r}: allowed is {allowed}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if getattr(value, "shape", None) == () and hasattr(
                value, "item"
            ):  # of numpy, or an array of one number
                value = value.item()
                object.__setattr__(self, field.name, value)
            if field.type == "float" or (field.type == "float | None" and value is not None):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                check(field.name, number and math.isfinite(value), "a finite number")
            elif field.type == "int" or (field.type == "int | None" and value is not None):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                check(field.name, number and math.isfinite(value) and value == int(value), "a whole number")
                # Ranges of a search space give floats, integers included.
                object.__setattr__(self, field.name, int(value))
        check("learning_rate", self.learning_rate >= 0, "a number >= 0")
        check("one_minus_beta1", 0 < self.one_minus_beta1 <= 1, "a number in (0, 1]")
        check("beta2", 0 <= self.beta2 < 1, "a number in [0, 1)")
        check("eps", self.eps >= 0, "a number >= 0")
        check("weight_decay", self.weight_decay >= 0, "a number >= 0")
        choice = self.approximation
        if isinstance(choice, Mapping):
            ok = set(choice) <= set(kind_names()) and set(choice.values()) <= set(APPROXIMATIONS)
        else:
            ok = choice in APPROXIMATIONS
        check("approximation", ok, f"one of {APPROXIMATIONS}, or a mapping from {LAYER_KINDS} to them")
        check("fisher", self.fisher in FISHERS, f"one of {FISHERS}")
        check("fisher_samples", self.fisher_samples >= 1, "at least 1")
        check("preconditioner", self.preconditioner in PRECONDITIONERS, f"one of {PRECONDITIONERS}")
        check("decomposition", self.decomposition in DECOMPOSITIONS, f"one of {DECOMPOSITIONS}")
        if self.decomposition == "qr" and self.preconditioner == "inverse":
            raise ValueError(
                'hyperparameter decomposition="qr" follows eigenbases: preconditioner="inverse" has none'
            )
        known = isinstance(self.scaling, type) or self.scaling in scaling_names()
        check("scaling", known, f"one of {scaling_names()}, or a class of your own")
        check("power", 0 < self.power <= 1, "a number in (0, 1]")
        check("polar_exponent", 0 <= self.polar_exponent <= 1, "a number in [0, 1]")
        check("polar_steps", self.polar_steps >= 1, "a whole number, at least 1")
        check("damping", self.damping > 0, "a number > 0")
        check("damping_mode", self.damping_mode in DAMPING_MODES, f"one of {DAMPING_MODES}")
        check("noise_floor", self.noise_floor is None or self.noise_floor >= 0, "a number >= 0, or None")
        check("factor_decay", 0 <= self.factor_decay < 1, "a number in [0, 1)")
        check("factor_interval", self.factor_interval >= 1, "at least 1")
        check(
            "statistics_rows",
            self.statistics_rows is None or self.statistics_rows >= 1,
            "a whole number, at least 1, or None",
        )
        check("statistics_rows_by_side", isinstance(self.statistics_rows_by_side, bool), "True or False")
        check("initial_statistics", self.initial_statistics >= 0, "at least 0")
        check(
            "refresh_interval",
            self.refresh_interval >= 1 and self.refresh_interval % self.factor_interval == 0,
            f"a multiple of factor_interval={self.factor_interval}",
        )
        check("initial_refreshes", self.initial_refreshes in INITIAL_REFRESHES, f"one of {INITIAL_REFRESHES}")
        check(
            "refresh_budget",
            self.refresh_budget is None or 0 < self.refresh_budget < 1,
            "a number in (0, 1), or None",
        )
        check("drift_tolerance", 0 <= self.drift_tolerance < 1, "a number in [0, 1)")
        check("length", self.length is None or self.length in LENGTHS, f"one of {LENGTHS}, or None")
        check("length_factor", self.length_factor > 0, "a number > 0")
        check("grafting", self.grafting is None or isinstance(self.grafting, bool), "True or False, or None")
        if self.grafting is not None and self.length is not None and self.grafting != (self.length == "graft"):
            raise ValueError(
                f"hyperparameter grafting={self.grafting} contradicts length={self.length!r}: leave grafting out"
            )
        check("max_factor_dim", self.max_factor_dim >= 1, "at least 1")
        check("large_factor", self.large_factor in LARGE_FACTORS, f"one of {LARGE_FACTORS}")

    @classmethod
    def from_hyperparameters(
        cls, hyperparameters: Mapping[str, object] | Point | None, **defaults: object
    ) -> KFACConfig:
        """Build a configuration from a point of a search space.

        Args:
            hyperparameters: a namedtuple (as AlgoPerf's runner hands over), a mapping, or None for the
                defaults alone (self-tuning).
            **defaults: values for what the point does not mention.

        Raises:
            ValueError: for an unknown name or a value out of range.
        """
        point = as_mapping(hyperparameters)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted((set(point) | set(defaults)) - known)
        if unknown:
            raise ValueError(f"unknown hyperparameter {unknown[0]!r}: known are {sorted(known)}")
        return cls(**(defaults | point))  # type: ignore[arg-type]  # checked when it is made

    @classmethod
    def updated(cls, config: KFACConfig | None, hyperparameters: Mapping[str, object]) -> KFACConfig:
        """A configuration (the defaults if None) with some fields replaced.

        Raises:
            ValueError: for an unknown name or a value out of range.
        """
        values = {} if config is None else {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return cls.from_hyperparameters(hyperparameters, **values)

    @property
    def row_limit(self) -> RowLimit:
        """How many rows statistics are formed of at least."""
        return RowLimit(self.statistics_rows, self.statistics_rows_by_side)

    @property
    def scaling_room(self) -> str | type:
        """The file of `scalings` that the configuration asks for, or the class that it names itself."""
        if self.preconditioner == "inverse":
            return "inverse"
        return "power" if self.scaling in POWERS else self.scaling

    @property
    def exponent(self) -> float:
        """Power of the inverse eigenvalues for the scalings that use them; of "polar", both of its powers."""
        if self.scaling == "polar":
            return WHITENING + self.polar_exponent
        return POWERS.get(self.scaling, self.power) if isinstance(self.scaling, str) else self.power

    @property
    def length_rule(self) -> str:
        """One of `LENGTHS`: what `length` and `grafting` come to."""
        if self.length is not None:
            return self.length
        return "none" if self.grafting is False else "graft"

    def check_kinds(self, declared: Iterable[str]) -> None:
        """Refuse an approximation for a kind of layer that there is none of.

        Args:
            declared: the names that a framework's kinds declare.

        Raises:
            ValueError: naming the kind.
        """
        named = self.approximation if isinstance(self.approximation, Mapping) else ()
        known = sorted({*LAYER_KINDS, *declared} - {TABLE})
        for kind in named:
            if kind not in known:
                raise ValueError(f"hyperparameter approximation: no layer is of the kind {kind!r}, only {known}")

    @property
    def floor(self) -> float:
        """The multiple of the noise level that damping is at least: `noise_floor`, or what None stands for."""
        if self.noise_floor is not None:
            return self.noise_floor
        return 1.0 if self.damping == DAMPING else 0.0

    def noise_level(self, eps: float) -> float:
        """The damping below which rounding takes part in steps, relative to a factor's largest eigenvalue.

        Rounding leaves errors of standard deviation eps / sqrt(12), relative, in the entries of a gradient, and so
        in directions where both factors are empty. Beside the directions of the largest eigenvalues a_max and b_max
        those are scaled up by (a_max b_max / (lambda_A lambda_B))^p: by the share lambda / max, to the power -2p.
        At the share (eps / sqrt(12))^(1 / 2p) the errors of all empty directions together come to the length of
        the largest part of the gradient; below, they exceed it. (What a polar factor lifts in addition, signal and
        rounding alike, is left out.)

        Args:
            eps: of the coarsest dtype among those that inputs, output gradients and factors came in.
        """
        power = 1.0 if self.preconditioner == "inverse" else self.exponent
        return float((eps / math.sqrt(12)) ** (0.5 / power))

    def approximation_for(self, kind: str) -> str:
        """The approximation of a layer kind; where reduce always fits, "mixed" is the same."""
        choice = self.approximation
        if isinstance(choice, Mapping):
            choice = choice.get("linear" if kind == TABLE else kind, "expand")
        return "reduce" if choice == "mixed" and kind not in LAYER_KINDS else choice


def as_mapping(hyperparameters: Mapping[str, object] | Point | None) -> dict[str, object]:
    """A point of a search space by name; empty for None.

    Raises:
        ValueError: for something else than a namedtuple, a mapping or None.
    """
    if hyperparameters is None:
        return {}
    if isinstance(hyperparameters, Mapping):
        return dict(hyperparameters)
    if hasattr(hyperparameters, "_asdict"):
        return hyperparameters._asdict()
    raise ValueError(
        f"hyperparameters must be a namedtuple, a mapping or None, got {type(hyperparameters).__name__}"
    )
