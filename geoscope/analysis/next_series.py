"""NExt on a series: its inputs from the files, its held-out moves, its prediction.

Its networks are trained again at every origin of the backtest on what was known there, so that its
skill stands in the same table as that of a line. That takes minutes where a line takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.analysis.series_tensors import Followed, ModelTensor
from geoscope.analysis.trajectory_report import Trajectory
from geoscope.errors import OptionError
from geoscope.linalg import Factors, Operand, factorise_leading
from geoscope.trajectory.backtest import Moves
from geoscope.trajectory.next_predictor import Example, NextOptions, next_guesses, predict, train
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.spatial_rank1 import Pair, outer_moves

__all__ = ["NEXT", "NextForecast", "next_forecast"]

NEXT = "next"


@dataclass(frozen=True)
class NextForecast:
    """horizon: H, in checkpoints; scale: of the pair, for a target that is not H ahead. pairs:
    tensor → predicted step. moves: for `backtest(others=)`.
    """

    horizon: int
    scale: float
    pairs: Mapping[str, Pair]
    moves: Moves


def next_forecast(
    found: Followed,
    made: Trajectory,
    target: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    training: int = 1000,
) -> NextForecast:
    """Train and backtest NExt for a target step. training: steps of each network.

    Raises OptionError for a series it cannot take.
    """
    T = len(found.steps) - 1
    if T < 4:
        raise OptionError(f"next: {T} checkpoints after the base; it needs 4 to hold any out")
    gap = (found.steps[-1] - found.steps[0]) / T
    horizon = min(max(1, round((target - found.steps[-1]) / gap)), T - 2)
    options = NextOptions(horizon=horizon, steps=training, seed=seed, device=device)
    examples = {
        name: Example(made.paths[name], made.local[name], _spans(tensor, horizon, seed))
        for name in made.paths
        if isinstance(tensor := found.tensors[name], ModelTensor)
    }
    pairs = predict(train(examples, found.steps, options), examples)
    guesses = next_guesses(examples, found.steps, range(2, T), options)
    rows = [_moves(found, made, name, guesses, horizon) for name in made.increments]
    moves = Moves(*(torch.stack([row[i] for row in rows]) for i in range(2)))
    return NextForecast(horizon, (target - found.steps[-1]) / (horizon * gap), pairs, moves)


def _spans(tensor: ModelTensor, horizon: int, seed: int) -> Rank1Path:
    """Leading pairs of Y_t = W_{t+H} − W_t, t = 1 … T − H."""
    rows: list[tuple[Factors, float]] = []
    near: Factors | None = None
    for change in tensor.spans(horizon):
        near = factorise_leading(change, min(2, *change.shape), cuts=(1,), seed=seed, near=near)
        rows.append((near, float(change.norm())))
    factors = [one for one, _ in rows]
    return Rank1Path(
        sigma=torch.stack([one.S[0, 0] for one in factors]),
        second=torch.stack([one.S[0, -1] for one in factors]),
        norm=torch.tensor([norm for _, norm in rows], dtype=torch.float64),
        u=torch.stack([_side(one.U).T[0] for one in factors]),
        v=torch.stack([_side(one.Vh)[0] for one in factors]),
    )


def _side(vectors: Tensor | None) -> Tensor:
    assert vectors is not None
    return vectors[0]


def _moves(
    found: Followed,
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
