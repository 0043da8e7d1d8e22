"""NExt on a series: its inputs from the files, its held-out moves, its prediction.

Its networks are trained again at origins of the backtest, in full, on what was known there, and its
skill is that from these origins. A credible horizon takes three, and each is a training of its own;
where no horizon is asked for there is one. The networks of all origins train beside each other, a
thread each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from geoscope.engine import cores, one_blas_thread
from geoscope.errors import OptionError
from geoscope.linalg import Factors, Operand, factorise_leading
from geoscope.trajectory.backtest import PredictionProducts
from geoscope.trajectory.next_predictor import (
    Example,
    NextModel,
    NextOptions,
    VectorExample,
    joined_model,
    observed,
    predict,
    predict_vectors,
    trainings,
)
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.spatial_rank1 import Pair, outer_moves
from geoscope.verbs.options import Progress
from geoscope.verbs.series.model_vectors import ModelVector
from geoscope.verbs.series.report import Trajectory
from geoscope.verbs.series.tensors import MatchedSeries, ModelTensor

__all__ = ["HORIZON_ORIGINS", "NEXT", "NextForecast", "next_forecast", "origins_of"]

NEXT = "next"
# Origins that a credible horizon takes.
HORIZON_ORIGINS = 3


@dataclass(frozen=True)
class NextForecast:
    """horizon: H, in checkpoints; scale: of the pair, for a target that is not H ahead. pairs:
    tensor → predicted step. vectors: the same of norms and biases, where they are predicted.
    moves: for `backtest(others=)`, zeros but from `origins`, where the networks were trained, too.
    """

    horizon: int
    scale: float
    pairs: Mapping[str, Pair]
    vectors: Mapping[str, Tensor]
    moves: PredictionProducts
    origins: tuple[int, ...]


def next_forecast(
    found: MatchedSeries,
    made: Trajectory,
    target: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    training: int = 1000,
    origins: int = HORIZON_ORIGINS,
    vectors: Mapping[str, ModelVector] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> NextForecast:
    """Train and backtest NExt for a target step. training: steps of each network. origins: how many
    of the backtest it trains at. vectors: norms and biases that train and are predicted, too. jobs:
    networks that train at once, default one a core.

    Raises OptionError for a series it cannot take.
    """
    T = len(found.steps) - 1
    if T < 4:
        raise OptionError(f"next: {T} checkpoints after the base; it needs 4 to hold any out")
    gap = (found.steps[-1] - found.steps[0]) / T
    horizon = min(max(1, round((target - found.steps[-1]) / gap)), T - 2)
    options = NextOptions(horizon=horizon, steps=training, seed=seed, device=device)
    workers = (jobs or cores()) if device == "cpu" else 1
    with one_blas_thread(), ThreadPoolExecutor(max(1, workers)) as pool:
        examples = _examples(found, made, horizon, seed, pool)
        norms = {name: vector.example(horizon) for name, vector in (vectors or {}).items()}
        tried = origins_of(T, horizon, origins)
        known = {
            origin: (observed(examples, origin, options), observed(norms, origin, options))
            for origin in (*tried, T)
        }
        models = _trained(known, found.steps, options, pool, progress)
        guesses = {origin: predict(models[origin], known[origin][0]) for origin in tried}
        pairs, steps = predict(models[T], examples), predict_vectors(models[T], norms)
        rows = [_moves(found, made, name, guesses, horizon) for name in made.increments]
    moves = PredictionProducts(*(torch.stack([row[i] for row in rows]) for i in range(2)))
    scale = (target - found.steps[-1]) / (horizon * gap)
    return NextForecast(horizon, scale, pairs, steps, moves, tried)


def origins_of(T: int, horizon: int, count: int = HORIZON_ORIGINS) -> tuple[int, ...]:
    """`count` origins at which the networks train again, of those that a backtest reports and that
    have seen a target; fewer where there are fewer.

    One alone is the first: its networks are the quickest to train, and most of the series is left
    to try them on. Of several the last is the one at two thirds of T, the nearest to the prediction
    that leaves a third to be tried on; others are spread evenly from the first one up to it, or
    follow it where there are not so many.
    """
    first = max(3, math.ceil(T / 3), horizon + 1)
    if count == 1:
        return (min(first, T - 1),)
    last = min(T - 1, max(first + count - 1, 2 * T // 3))
    count = min(count, last - first + 1)
    return tuple(last - (last - first) * i // max(count - 1, 1) for i in reversed(range(count)))


def _examples(
    found: MatchedSeries, made: Trajectory, horizon: int, seed: int, pool: ThreadPoolExecutor
) -> dict[str, Example]:
    tensors = {
        name: tensor
        for name in made.paths
        if isinstance(tensor := found.tensors[name], ModelTensor)
    }
    targets = pool.map(lambda tensor: _spans(tensor, horizon, seed), tensors.values())
    return {
        name: Example(made.paths[name], made.local[name], target)
        for name, target in zip(tensors, targets, strict=True)
    }


_Known = tuple[Mapping[str, Example], Mapping[str, VectorExample]]


def _trained(
    known: Mapping[int, _Known],
    steps: Sequence[float],
    options: NextOptions,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> dict[int, NextModel]:
    """origin → its networks, all trained beside each other, the largest first."""
    jobs = [
        (origin, job)
        for origin, (examples, vectors) in known.items()
        for job in trainings(examples, steps[: origin + 1], options, vectors=vectors)
    ]
    jobs.sort(key=lambda one: -one[1].work)
    tell, stop = (progress or Progress()).on_network, Event()
    running = {
        pool.submit(copy_context().run, job.run, stop.is_set): origin for origin, job in jobs
    }
    try:
        tell(0, len(jobs))
        for done, _ in enumerate(as_completed(running), start=1):
            tell(done, len(jobs))
    finally:  # on Ctrl-C those at work end with their next step
        stop.set()
        for future in running:
            future.cancel()
    return {
        origin: joined_model(options, [one.result() for one in running if running[one] == origin])
        for origin in known
    }


def _spans(tensor: ModelTensor, horizon: int, seed: int) -> Rank1Path:
    """Leading pairs of Y_t = W_{t+H} − W_t, t = 1 … T − H."""
    rows: list[tuple[Factors, float]] = []
    near: Factors | None = None
    for change in tensor.spans(horizon):
        k = min(2, *change.shape)
        near = factorise_leading(change, k, cuts=(1,), seed=seed, near=near, certified=1)
        rows.append((near, float(change.norm())))
    factors = [one for one, _ in rows]
    return Rank1Path(
        sigma=torch.stack([factor.S[0, 0] for factor in factors]),
        second=torch.stack([factor.S[0, -1] for factor in factors]),
        norm=torch.tensor([norm for _, norm in rows], dtype=torch.float64),
        u=torch.stack([_side(factor.U).T[0] for factor in factors]),
        v=torch.stack([_side(factor.Vh)[0] for factor in factors]),
    )


def _side(vectors: Tensor | None) -> Tensor:
    assert vectors is not None
    return vectors[0]


def _moves(
    found: MatchedSeries,
    made: Trajectory,
    name: str,
    guesses: Mapping[int, Mapping[str, Pair]],
    horizon: int,
) -> tuple[Tensor, Tensor]:
    """(ahead, energy) of one tensor: ûᵀΔ_τv̂ of every origin's guess, in one pass."""
    origins = [origin for origin in guesses if name in guesses[origin]]
    own = {origin: guesses[origin][name] for origin in origins}
    if not own:
        return outer_moves(made.increments[name], {}, {}, horizon)
    left, right = (torch.stack([getattr(own[o], side) for o in origins]) for side in ("u", "v"))
    images = _images(found.tensors[name], left, right)
    products = {origin: images[:, i] for i, origin in enumerate(origins)}
    return outer_moves(made.increments[name], own, products, horizon)


def _images(tensor: object, left: Tensor, right: Tensor) -> Tensor:
    """u_oᵀ·Δ_τ·v_o, (T, origins)."""
    assert isinstance(tensor, ModelTensor)
    rows: Sequence[Tensor] = [
        (whole.right(right[None])[0] * left).sum(-1)
        for whole, _ in tensor.changes()
        if isinstance(whole, Operand)
    ]
    return torch.stack(list(rows))
