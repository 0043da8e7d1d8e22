"""What a run does step by step: one pass over every tensor, then everything from what it keeps."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass, replace

import torch

from geoscope.analysis.follow_metric import metric_curve
from geoscope.analysis.follow_options import FollowOptions
from geoscope.analysis.options import Progress
from geoscope.analysis.series_tensors import Change, Followed, SeriesTensor, open_followed
from geoscope.analysis.trajectory_report import Trajectory, trajectory_report
from geoscope.engine import one_blas_thread
from geoscope.errors import NumericsError
from geoscope.linalg import Factors, Operand, factorise_leading
from geoscope.linalg.product import factorise_product
from geoscope.records import Report, Skipped
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.rank1 import Rank1Path

__all__ = ["follow", "measure_series"]


@dataclass(frozen=True)
class _Kept:
    """What the pass keeps of one tensor."""

    increments: Increments
    path: Rank1Path | None = None
    local: Rank1Path | None = None
    products: torch.Tensor | None = None


def follow(
    references: Sequence[str],
    *,
    options: FollowOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """The trajectory of a series of checkpoints: statistics, rank-1 paths, held-out skill.

    references: folders in any order, one run folder, globs, `repo@step_*`. Raises GeoscopeError.

    >>> follow(["runs/grpo"], options=FollowOptions(base="base/"))  # doctest: +SKIP
    """
    options = options or FollowOptions()
    started = time.perf_counter()
    progress = progress or Progress()
    found = open_followed(references, options, progress)
    curve, notes = metric_curve(found.series, options)
    found = replace(found, notes=(*found.notes, *notes))
    measured = measure_series(found, options, progress)
    return trajectory_report(
        found,
        measured,
        options,
        curve=curve,
        argv=tuple(sys.argv),
        seconds=time.perf_counter() - started,
    )


def measure_series(found: Followed, options: FollowOptions, progress: Progress) -> Trajectory:
    """Increments and rank-1 paths of every tensor; those that fail are named with the reason."""
    kept: dict[str, _Kept] = {}
    failed: list[Skipped] = []
    workers = options.jobs or torch.get_num_threads()
    with one_blas_thread(), ThreadPoolExecutor(max(1, workers)) as pool:
        # The largest first: the last to finish is then a small one.
        order = sorted(found.tensors.values(), key=lambda one: -math.prod(one.shape))
        jobs = {
            pool.submit(copy_context().run, _measured, one, found, options): one for one in order
        }
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                one = jobs[job]
                try:
                    kept[one.name] = job.result()
                except NumericsError as error:
                    failed.append(Skipped(one.name, str(error), missing=True))
                progress.on_pair(number, len(jobs), one.name)
        finally:
            for job in jobs:
                job.cancel()
    if not kept:
        raise NumericsError(f"no tensor of the series could be followed; {failed[0].reason}")
    names = [name for name in found.tensors if name in kept]
    return Trajectory(
        increments={name: kept[name].increments for name in names},
        paths={name: path for name in names if (path := kept[name].path) is not None},
        local={name: path for name in names if (path := kept[name].local) is not None},
        products={name: one for name in names if (one := kept[name].products) is not None},
        failed=tuple(failed),
    )


def _measured(tensor: SeriesTensor, found: Followed, options: FollowOptions) -> _Kept:
    try:
        increments = tensor.increments(found.steps)
        if not options.directions:
            return _Kept(increments)
        path, local = _paths(tensor, increments, options.seed)
        products = _pair_products(tensor, path)
    except NumericsError as error:
        raise NumericsError(f"{tensor.name}: {error}") from None
    return _Kept(increments, path, local, products)


def _pair_products(tensor: SeriesTensor, path: Rank1Path) -> torch.Tensor:
    """u_iᵀ·Δ_τ·v_j of all τ, i, j, (T, T, T): what backtests of rank-1 predictions take."""
    rows = [path.u @ whole.right(path.v[None])[0].T for whole, _ in tensor.changes()]
    return torch.stack(rows)


def _paths(tensor: SeriesTensor, increments: Increments, seed: int) -> tuple[Rank1Path, Rank1Path]:
    """Leading pairs of every Δ_i and δ_i; each search starts where the last one ended."""
    pairs: list[tuple[Factors, Factors]] = []
    near: tuple[Factors | None, Factors | None] = (None, None)
    for whole, step in tensor.changes():
        near = _leading(whole, near[0], seed), _leading(step, near[1], seed)
        pairs.append(near)
    norms = increments.G.diagonal(), increments.H.diagonal()
    return tuple(_path([one[which] for one in pairs], energy) for which, energy in enumerate(norms))  # pyright: ignore[reportReturnType]


def _leading(change: Change, near: Factors | None, seed: int) -> Factors:
    k = min(2, *change.shape)
    if isinstance(change, Operand):
        return factorise_leading(change, k, cuts=(1,), seed=seed, near=near)
    return factorise_product(change, vectors=k, cuts=(1,))


def _path(factors: Iterable[Factors], energy: torch.Tensor) -> Rank1Path:
    rows = list(factors)
    u, v = (torch.stack([_first(one, side) for one in rows]) for side in ("left", "right"))
    return Rank1Path(
        sigma=torch.stack([one.S[0, 0] for one in rows]),
        second=torch.stack(
            [one.S[0, 1] if one.S.shape[1] > 1 else one.S[0, 0] * 0 for one in rows]
        ),
        norm=energy.clamp_min(0).sqrt(),
        u=u,
        v=v,
    )


def _first(one: Factors, side: str) -> torch.Tensor:
    """u_1 or v_1; a zero update has none, and gets zeros."""
    assert one.U is not None and one.Vh is not None
    rows = one.U[0].T if side == "left" else one.Vh[0]
    return rows[0] if len(rows) else rows.new_zeros(rows.shape[1])
