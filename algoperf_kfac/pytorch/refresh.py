"""New preconditioners from the current factors: damping, decomposition, retries.

Matrices of one shape are decomposed in one batched call. `decompose` only reads the layers' states and `install`
writes them, so that processes can share the work and send each other the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState, damping_terms, mean_eigenvalue
from algoperf_kfac.pytorch.scalings import Scaling

# Damping of the retries after a failed decomposition, as multiples of the configured one.
RETRIES = (1.0, 10.0, 100.0)


@dataclasses.dataclass
class Refresh:
    """What the refresh of one layer came to; `install` puts it into the layer's state.

    Attributes:
        a_basis, b_basis, a_values, b_values: as in `LayerState`; empty where the old ones stay.
        renewed: whether the decomposition succeeded and there are new bases or inverses.
        skipped: whether the bases were kept because they had not drifted, with new values in them.
        failures: failed attempts.
        drift: of the factors in the old basis.
    """

    a_basis: list[Tensor] = dataclasses.field(default_factory=list)
    b_basis: list[Tensor] = dataclasses.field(default_factory=list)
    a_values: list[Tensor] = dataclasses.field(default_factory=list)
    b_values: list[Tensor] = dataclasses.field(default_factory=list)
    renewed: bool = False
    skipped: bool = False
    failures: int = 0
    drift: float = 0.0


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in the products of float32 matrices; afterwards the setting is what it was.

    AlgoPerf's runner switches it on for the whole process. Its ten bits are too few for eigenvalues that span five
    orders of magnitude, and for an operator that stays for an interval. Through torch's older setting, because a
    mix with the newer one is refused; only where the newer one alone is in use, and the older therefore cannot be
    read, through that.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        matmul: Any = torch.backends.cuda.matmul
        newer = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = newer
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def refresh(layers: list[tuple[LayerSpec, LayerState]], scaling: Scaling) -> None:
    """Recompute the preconditioners of `layers` from their current statistics, all in this process."""
    states = [state for _, state in layers]
    for state, result in zip(states, decompose(states, scaling), strict=True):
        install(state, result, scaling)


@full_precision()
def decompose(states: list[LayerState], scaling: Scaling) -> list[Refresh]:
    """The new preconditioners of layers; their states are only read.

    Matrices of equal shape are decomposed in one batched call. What fails is retried in float64 with more
    damping; what still fails is to keep the last good decomposition. Both are counted. A layer that saw no input
    or no gradient yet has nothing to decompose, and is asked again at the next refresh.
    """
    config = scaling.config
    jobs = []
    for state in states:
        a, b = state.corrected()
        jobs.append(
            _Job(state, a, b, damping_terms(a, b, config, state.noise_level(config)), Refresh(drift=state.drift))
        )
    if scaling.uses_bases:
        _decompose_bases(jobs, config)
    else:
        _decompose_inverses(jobs, config)
    return [job.result for job in jobs]


@full_precision()
def install(state: LayerState, result: Refresh, scaling: Scaling) -> None:
    """Put a refresh into its layer's state, which then depends on the old state and on `result` alone."""
    if result.renewed:
        if state.refreshes:
            scaling.transport(state, result.a_basis, result.b_basis)
        state.a_basis, state.b_basis = result.a_basis, result.b_basis
    if result.renewed or result.skipped:
        state.a_values, state.b_values = result.a_values, result.b_values
        state.a_operator, state.b_operator = scaling.operators(state)
    if not scaling.keeps_bases:
        state.a_basis, state.b_basis = [], []
    state.refreshes += result.renewed
    state.skipped += result.skipped
    state.failures += result.failures
    state.drift = result.drift


@dataclasses.dataclass
class _Job:
    state: LayerState
    a: list[Tensor]
    b: list[Tensor]
    damping: tuple[Tensor, Tensor]
    result: Refresh

    def is_silent(self) -> Tensor:
        """Whether a factor is zero altogether, a boolean scalar; NaN is not, it shall fail and be counted."""
        means = torch.stack([mean_eigenvalue(blocks).amax() for blocks in (self.a, self.b) if blocks])
        return (means == 0).any()

    def damped(self) -> list[Tensor]:
        """All blocks of A, then of B, each plus its damping."""
        return [
            m + damping[:, None, None] * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
            for blocks, damping in zip((self.a, self.b), self.damping, strict=True)
            for m in blocks
        ]

    def followed(self) -> list[Tensor]:
        """The same (groups, n, n), and beside each its last basis (together n x 2n), the largest eigenvalue first.

        In this order the iteration converges: what a column has of those before it is taken out of it.
        """
        state = self.state
        values, bases = [*state.a_values, *state.b_values], [*state.a_basis, *state.b_basis]
        orders = [v.argsort(dim=1, descending=True, stable=True) for v in values]
        return [
            torch.cat([m, q.gather(2, order.unsqueeze(1).expand_as(q))], 2)
            for m, q, order in zip(self.damped(), bases, orders, strict=True)
        ]


def _decompose_inverses(jobs: list[_Job], config: KFACConfig) -> None:
    for job, parts in zip(jobs, _decompose(jobs, _inverse, config), strict=True):
        if parts is not None:
            inverses, k = [p[0] for p in parts], len(job.a)
            job.result.a_basis, job.result.b_basis = inverses[:k], inverses[k:]
            job.result.renewed = True


def _decompose_bases(jobs: list[_Job], config: KFACConfig) -> None:
    due = []
    for job, drift in zip(jobs, _drifts(jobs, config), strict=True):
        if drift is None or not drift <= config.drift_tolerance:
            due.append(job)
        else:
            job.result.a_values = _rotated_diagonals(job.a, job.state.a_basis, job.damping[0])
            job.result.b_values = _rotated_diagonals(job.b, job.state.b_basis, job.damping[1])
            job.result.skipped = True
    follows = config.decomposition == "qr"
    following = [job for job in due if follows and job.state.refreshes]
    fresh = [job for job in due if not (follows and job.state.refreshes)]
    found = [*_decompose(fresh, _eigh, config), *_decompose(following, _qr, config, _Job.followed)]
    for job, parts in zip([*fresh, *following], found, strict=True):
        if parts is None:
            continue
        k, result = len(job.a), job.result
        # Damping was added before the decomposition, so that rank-deficient factors decompose.
        floors = [job.damping[0]] * k + [job.damping[1]] * len(job.b)
        values = [p[0].clamp(min=floor[:, None]) for p, floor in zip(parts, floors, strict=True)]
        # In memory of their own: slices would keep the whole batch alive, and products of the same numbers at other
        # addresses round differently, so that a resumed run would drift from the one it continues.
        bases = [p[1].clone(memory_format=torch.contiguous_format) for p in parts]
        result.a_values, result.b_values = values[:k], values[k:]
        result.a_basis, result.b_basis = bases[:k], bases[k:]
        result.renewed = True


def _drifts(jobs: list[_Job], config: KFACConfig) -> list[float | None]:
    """How far each layer's factors are from diagonal in their old bases; None where there is no basis yet."""
    if config.drift_tolerance == 0:
        return [None] * len(jobs)
    known = [job for job in jobs if job.state.refreshes]
    if not known:
        return [None] * len(jobs)
    shares = []
    for job in known:
        worst = []
        for m, basis in zip([*job.a, *job.b], [*job.state.a_basis, *job.state.b_basis], strict=True):
            rotated = basis.transpose(1, 2) @ m @ basis
            off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
            tiny = torch.finfo(m.dtype).tiny
            worst.append((off.square().sum() / rotated.square().sum().clamp(min=tiny)).sqrt())
        shares.append(torch.stack(worst).amax())
    values = torch.stack(shares).tolist()  # the one synchronisation
    for job, value in zip(known, values, strict=True):
        job.result.drift = value
    return [job.result.drift if job.state.refreshes else None for job in jobs]


def _rotated_diagonals(blocks: list[Tensor], bases: list[Tensor], damping: Tensor) -> list[Tensor]:
    return [
        (basis * (m @ basis)).sum(1).clamp(min=0) + damping[:, None] for m, basis in zip(blocks, bases, strict=True)
    ]


Decomposition = Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]


def _inverse(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Batched inverse of positive definite matrices, and which of them succeeded."""
    root, info = torch.linalg.cholesky_ex(matrices)
    # A failed root is replaced, so that the others of the batch still get their inverse.
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    root = torch.where((info == 0)[:, None, None], root, eye)
    inverse = torch.cholesky_inverse(root)
    return (inverse,), (info == 0) & _are_finite(inverse)


def _eigh(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Batched eigendecomposition, and which of the matrices succeeded."""
    finite = _are_finite(matrices)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    matrices = torch.where(finite[:, None, None], matrices, eye)
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except RuntimeError as error:
        # On a CPU some releases, 2.5 for one, give LAPACK too small a workspace for more than 2894 rows in float32,
        # whose size float32 rounds down (pytorch/pytorch#83818).
        if "illegal value" not in str(error) or matrices.dtype == torch.float64:
            raise
        values, vectors = (part.to(matrices.dtype) for part in torch.linalg.eigh(matrices.double()))
    ok = finite & values.sum(-1).isfinite() & _are_finite(vectors)
    return (values, vectors), ok


def _qr(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """One step of orthogonal iteration of (m, n, 2n) matrices, each with a basis beside it, and which succeeded.

    The new basis Q is that of (M Q_old) = Q R; the values are the Rayleigh quotients q^T M q of its columns.
    """
    m, basis = matrices.chunk(2, -1)
    # Householder's, which is backward stable: columns may differ in length as much as eigenvalues do.
    vectors = torch.linalg.qr(m @ basis)[0]
    values = (vectors * (m @ vectors)).sum(1)
    return (values, vectors), values.sum(-1).isfinite() & _are_finite(vectors)


def _are_finite(matrices: Tensor) -> Tensor:
    """(..., n, m) -> (...). By the sum: a look at each entry takes a fifth of the decomposition's time on a CPU."""
    return matrices.sum((-2, -1)).isfinite()


def _attempt(decompose: Decomposition, matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor] | None:
    try:
        return decompose(matrices)
    except torch.linalg.LinAlgError:  # one bad matrix fails a whole batch
        return None


def _decompose(
    jobs: list[_Job],
    decompose: Decomposition,
    config: KFACConfig,
    matrices: Callable[[_Job], list[Tensor]] = _Job.damped,
) -> list[list[tuple[Tensor, ...]] | None]:
    """Decompose every damped block of every layer, equal shapes in one batch; None for a layer that failed, or has
    a factor that is zero.

    Args:
        jobs: the layers.
        decompose: what is done to a batch.
        config: says how the failed ones are tried again.
        matrices: what is decomposed of a layer.
    """
    if not jobs:
        return []
    blocks = [matrices(job) for job in jobs]
    by_shape: dict[tuple[int, torch.dtype, torch.device], list[tuple[int, int]]] = {}
    for i, layer in enumerate(blocks):
        for k, m in enumerate(layer):
            by_shape.setdefault((m.shape[-1], m.dtype, m.device), []).append((i, k))
    results: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    verdicts: list[tuple[list[tuple[int, int]], Tensor]] = []
    failed: set[int] = set()
    for places in by_shape.values():
        batch = torch.cat([blocks[i][k] for i, k in places])
        attempt = _attempt(decompose, batch)
        if attempt is None:
            failed.update(i for i, _ in places)
            continue
        parts, ok = attempt
        sizes = [len(blocks[i][k]) for i, k in places]
        for place, part in zip(places, zip(*(p.split(sizes) for p in parts), strict=True), strict=True):
            results[place] = part
        verdicts.append((places, torch.stack([chunk.all() for chunk in ok.split(sizes)])))
    silent = torch.stack([job.is_silent() for job in jobs])
    flags = torch.cat([silent, *(ok for _, ok in verdicts)]).tolist()  # the one synchronisation
    places_in_order = [place for places, _ in verdicts for place in places]
    failed |= {i for (i, _), ok in zip(places_in_order, flags[len(jobs) :], strict=True) if not ok}

    def outcome(i: int) -> list[tuple[Tensor, ...]] | None:
        if flags[i]:
            return None
        if i in failed:
            return _retry(jobs[i], _eigh if decompose is _qr else decompose, config)
        return [results[i, k] for k in range(len(blocks[i]))]

    return [outcome(i) for i in range(len(jobs))]


def _retry(job: _Job, decompose: Decomposition, config: KFACConfig) -> list[tuple[Tensor, ...]] | None:
    """One layer alone, in float64, with growing damping; None if nothing helps."""
    job.result.failures += 1
    a, b = [m.double() for m in job.a], [m.double() for m in job.b]
    doubles = dataclasses.replace(job, a=a, b=b)
    dtype = (job.a or job.b)[0].dtype
    for multiple in RETRIES:
        doubles.damping = damping_terms(a, b, config, job.state.noise_level(config), multiple)
        attempts = [_attempt(decompose, m) for m in doubles.damped()]
        if all(attempt is not None and bool(attempt[1].all()) for attempt in attempts):
            job.damping = (doubles.damping[0].to(dtype), doubles.damping[1].to(dtype))
            return [tuple(p.to(dtype) for p in attempt[0]) for attempt in attempts if attempt is not None]
        job.result.failures += 1
    return None
