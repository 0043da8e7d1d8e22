"""NExt (2604.11446): small networks that predict the next update's leading pair.

See docs/methods.md#extrapolators. Per checkpoint t: far Δ_t = W_t − W_0, near δ_t = W_t − W_{t−1},
target Y_t = W_{t+H} − W_t, each by its first pair (u, σ, v); 1-D parameters by the raw difference.
One network for all u of a length m (with the 1-D differences of that length), one for all v of a
length n, one for all σ. Architecture, loss and schedule are as published.

Not as published: signs are aligned (far from last to first and the last by its largest entry, near
to far, target to near); weights start from a seed; on request (`validation`) the number of training
steps is the one of the least loss on held-out checkpoints. Left as it was: σ of 1e-5 and unit
vectors in losses of one form, no step and no scale among the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from geoscope.errors import OptionError
from geoscope.profile import stage
from geoscope.trajectory.next_network import Predictor
from geoscope.trajectory.rank1 import Rank1Path, align_signs
from geoscope.trajectory.spatial_rank1 import Pair

__all__ = [
    "Example",
    "Fit",
    "NetworkJob",
    "NextModel",
    "NextOptions",
    "VectorExample",
    "joined_model",
    "observed",
    "predict",
    "predict_vectors",
    "train",
    "trainings",
]

# Entries of the widest layer (2d) that are held at once; sums of gradients over parts are exact.
_PART = 1 << 24
# Rows whose products take as long as the optimiser does.
_PASSES = 64
# Looks at the held-out loss during training.
_LOOKS = 20


@dataclass(frozen=True)
class NextOptions:
    """horizon: H, in checkpoints. The rest as published: 1000 steps of AdamW, full batch, learning
    rate 2e-5 falling to 2e-6 by a cosine, L1 loss, layers of 256.

    validation: share of the training checkpoints, the latest, that are held out to choose the
    number of steps, which is not as published; 0 trains for all `steps`. With one training
    checkpoint tensors are held out.
    """

    horizon: int
    steps: int = 1000
    rate: float = 2e-5
    last_rate: float = 2e-6
    loss: str = "l1"
    width: int = 256
    validation: float = 0.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.steps < 1 or not 0 <= self.validation < 1:
            raise OptionError(
                "next: needs horizon ≥ 1, steps ≥ 1 and 0 ≤ validation < 1, but got "
                f"{self.horizon}, {self.steps} and {self.validation:g}"
            )
        if self.loss not in ("l1", "l2"):
            raise OptionError(f"next: loss {self.loss!r} is neither l1 nor l2")


@dataclass(frozen=True)
class Example:
    """A matrix: pairs of far and near at checkpoints 1 … T, of the target at 1 … T − H."""

    far: Rank1Path
    near: Rank1Path
    target: Rank1Path

    def observed(self, count: int, horizon: int) -> Example:
        """What was known at checkpoint `count`."""
        return Example(
            _first(self.far, count), _first(self.near, count), _first(self.target, count - horizon)
        )


@dataclass(frozen=True)
class VectorExample:
    """A norm or bias: far and near (T, d), target (T − H, d), the raw differences."""

    far: Tensor
    near: Tensor
    target: Tensor

    @classmethod
    def of(cls, weights: Tensor, horizon: int) -> VectorExample:
        """From W_0 … W_T, (T + 1, d)."""
        later = weights[1:]
        ahead = later[horizon:] - later[: len(later) - horizon]
        return cls(later - weights[0], weights.diff(dim=0), ahead)

    def observed(self, count: int, horizon: int) -> VectorExample:
        """What was known at checkpoint `count`."""
        return VectorExample(self.far[:count], self.near[:count], self.target[: count - horizon])


@dataclass(frozen=True)
class Fit:
    """How one network was trained. Losses: mean over checkpoints of the sum over the entries.

    key: `u:LENGTH`, `v:LENGTH` or `sigma:1`. rows: training rows. steps: taken in the end. first,
    last: training loss before and after. held_out: loss on what was held out at `steps`, None
    without; persistence, zero: that of predicting `near`, and nothing, there.
    """

    key: str
    parameters: int
    rows: int
    steps: int
    first: float
    last: float
    held_out: float | None
    persistence: float | None
    zero: float | None


@dataclass(frozen=True)
class NextModel:
    """Trained networks by key, on the CPU."""

    options: NextOptions
    networks: Mapping[str, nn.Module]
    fits: tuple[Fit, ...]


Known = TypeVar("Known", Example, VectorExample)

# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Of one network, fp32: far, near (T, rows, d), target (T − H, rows, d)."""

    far: Tensor
    near: Tensor
    target: Tensor


def _first(path: Rank1Path, count: int) -> Rank1Path:
    return Rank1Path(
        path.sigma[:count], path.second[:count], path.norm[:count], path.u[:count], path.v[:count]
    )


def _turned(path: Rank1Path, guide: Rank1Path) -> Rank1Path:
    """Each u and v turned together so that they point as those of the guide, step by step."""
    u, v = guide.u[: len(path)], guide.v[: len(path)]
    agreement = (path.u * u).sum(1) + (path.v * v).sum(1)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(path.u.dtype)[:, None]
    return Rank1Path(path.sigma, path.second, path.norm, path.u * sign, path.v * sign)


def _oriented(path: Rank1Path) -> Rank1Path:
    """Aligned from last to first; the last pair so that its largest entry of u is positive.

    A network is not odd: without a rule for the last pair, the arbitrary sign of the solver would
    reach the prediction.
    """
    path = align_signs(path)[0]
    last = path.u[-1]
    sign = -1.0 if float(last[last.abs().argmax()]) < 0 else 1.0
    return Rank1Path(path.sigma, path.second, path.norm, sign * path.u, sign * path.v)


def _aligned(example: Example) -> Example:
    far = _oriented(example.far)
    near = _turned(example.near, far)
    return Example(far, near, _turned(example.target, near))


_Entry = tuple[str, str, Tensor, Tensor, Tensor]


def _entries(examples: Mapping[str, Example], vectors: Mapping[str, VectorExample]) -> list[_Entry]:
    """(key, name, far, near, target) of everything, by name so that no order given matters."""
    found: list[_Entry] = []
    for name in sorted(examples):
        one = _aligned(examples[name])
        parts: dict[str, Callable[[Rank1Path], Tensor]] = {
            f"u:{one.far.u.shape[1]}": lambda path: path.u,
            f"v:{one.far.v.shape[1]}": lambda path: path.v,
            "sigma:1": lambda path: path.sigma[:, None],
        }
        for key, part in parts.items():
            found.append((key, name, part(one.far), part(one.near), part(one.target)))
    for name in sorted(vectors):
        raw = vectors[name]
        found.append((f"u:{raw.far.shape[1]}", name, raw.far, raw.near, raw.target))
    return found


def _rows(entries: Sequence[_Entry], key: str) -> _Rows:
    mine = [entry[2:] for entry in entries if entry[0] == key]
    far, near, target = (torch.stack([one[i] for one in mine], 1).float() for i in range(3))
    return _Rows(far, near, target)


def _checked(entries: Sequence[_Entry], steps: Sequence[float], horizon: int) -> int:
    """The number of training checkpoints. Raises OptionError."""
    if not entries:
        raise OptionError("next: no tensor to learn from")
    gaps = [after - before for before, after in pairwise(steps)]
    if max(gaps) - min(gaps) > 1e-6 * max(gaps):
        raise OptionError(
            f"next: the checkpoints are {min(gaps):g} to {max(gaps):g} steps apart, but its "
            "networks need equal distances; give such checkpoints (`steps`), or another method"
        )
    T = len(gaps)
    for _, name, far, near, target in entries:
        if (len(far), len(near), len(target)) != (T, T, T - horizon) or T <= horizon:
            raise OptionError(
                f"next: {name} has {len(far)} far, {len(near)} near and {len(target)} target "
                f"pairs; {T} checkpoints and a horizon of {horizon} need {T}, {T} and "
                f"{max(1, T - horizon)}"
            )
    return T - horizon


# --- training -----------------------------------------------------------------------------------


def train(
    examples: Mapping[str, Example],
    steps: Sequence[float],
    options: NextOptions,
    *,
    vectors: Mapping[str, VectorExample] | None = None,
) -> NextModel:
    """Train a network per key. steps: t_0 … T of the checkpoints, equally spaced.

    Same seed, same device: same networks. Raises OptionError for data that do not fit.
    """
    jobs = trainings(examples, steps, options, vectors=vectors)
    return joined_model(options, [job.run() for job in jobs])


def joined_model(options: NextOptions, done: Sequence[tuple[nn.Module, Fit]]) -> NextModel:
    """The model of what `trainings` have given."""
    fits = tuple(fit for _, fit in done)
    return NextModel(options, {fit.key: network for network, fit in done}, fits)


@dataclass(frozen=True)
class NetworkJob:
    """The training of one network, on its own: jobs may run beside each other in threads."""

    key: str
    rows: _Rows
    times: int
    options: NextOptions
    seed: int

    @property
    def length(self) -> int:
        return int(self.key.partition(":")[2])

    @property
    def work(self) -> int:
        """In proportion to the time of one step: products of the rows, and passes over weights."""
        return (self.times * self.rows.far.shape[1] + _PASSES) * self.length

    @stage("train next")
    def run(self, stopped: Callable[[], bool] = lambda: False) -> tuple[nn.Module, Fit]:
        """The network, on the CPU. Raises InterruptedError once `stopped()`, asked every step."""
        generator = torch.Generator().manual_seed(self.seed)
        network, fit = _fit(
            self.key, self.length, self.rows, self.times, self.options, generator, stopped
        )
        return network.cpu(), fit


def trainings(
    examples: Mapping[str, Example],
    steps: Sequence[float],
    options: NextOptions,
    *,
    vectors: Mapping[str, VectorExample] | None = None,
) -> list[NetworkJob]:
    """The networks that `train` trains, each for itself. Raises OptionError."""
    entries = _entries(examples, vectors or {})
    times = _checked(entries, steps, options.horizon)
    return [
        NetworkJob(key, _rows(entries, key), times, options, options.seed + i)
        for i, key in enumerate(sorted({entry[0] for entry in entries}))
    ]


def _fit(
    key: str,
    length: int,
    rows: _Rows,
    times: int,
    options: NextOptions,
    generator: torch.Generator,
    stopped: Callable[[], bool],
) -> tuple[nn.Module, Fit]:
    start = Predictor(length, options.width, generator)
    everything = torch.ones(times, rows.far.shape[1], dtype=torch.bool)
    held = _held_out(everything, options, generator)
    taken, best = options.steps, None
    if held is not None:
        learned, kept = held
        tried = _Training(start, rows, learned, options)
        looks = sorted({max(1, round(options.steps * i / _LOOKS)) for i in range(1, _LOOKS + 1)})
        losses = []
        for look in looks:
            tried.advance(look, stopped)
            losses.append(_loss_on(tried.network, rows, kept, options))
        best = min(losses)
        taken = looks[losses.index(best)]
    training = _Training(start, rows, everything, options)
    first = _loss_on(training.network, rows, everything, options)
    training.advance(taken, stopped)
    fit = Fit(
        key=key,
        parameters=sum(parameter.numel() for parameter in training.network.parameters()),
        rows=int(everything.sum()),
        steps=taken,
        first=first,
        last=_loss_on(training.network, rows, everything, options),
        held_out=best,
        persistence=None if held is None else _plain_loss(rows, held[1], options, near=True),
        zero=None if held is None else _plain_loss(rows, held[1], options, near=False),
    )
    return training.network.eval(), fit


def _held_out(
    everything: Tensor, options: NextOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """Masks (times, rows) of what is learned from and what is held out; None for no split.

    The latest checkpoints are held out, and those whose target reaches past the first of them are
    left out where others remain. With one checkpoint, tensors drawn by seed.
    """
    times, count = everything.shape
    learned, held = everything.clone(), torch.zeros_like(everything)
    if options.validation == 0:
        return None
    if times > 1:
        first = times - min(times - 1, math.ceil(options.validation * times))
        held[first:] = True
        last = first - options.horizon + 1  # t + H ≤ first
        learned[last if last > 0 else first :] = False
        return learned, held
    out = int(options.validation * count)
    if out == 0:
        return None
    held[:, torch.randperm(count, generator=generator)[:out]] = True
    return learned & ~held, held


class _Training:
    """One run of AdamW under the cosine of the full length, stopped and continued at will."""

    def __init__(
        self,
        start: Predictor,
        rows: _Rows,
        mask: Tensor,
        options: NextOptions,
    ) -> None:
        self.network = deepcopy(start).to(options.device)
        joined = self.network.joined_parameters()
        self.optimizer = torch.optim.AdamW([joined], lr=options.rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=options.steps, eta_min=options.last_rate
        )
        self.data = _selected(rows, mask, options)
        self.options = options
        self.done = 0

    def advance(self, until: int, stopped: Callable[[], bool]) -> None:
        """Train up to this many steps in all. Raises InterruptedError once `stopped()`."""
        while self.done < until:
            if stopped():
                raise InterruptedError
            _differentiate(self.network, self.data, self.options)
            self.optimizer.step()
            self.schedule.step()
            self.done += 1


_Data = tuple[Tensor, Tensor, Tensor, int]


def _selected(rows: _Rows, mask: Tensor, options: NextOptions) -> _Data:
    """far, near and target of the marked rows, (N, d), and the number of checkpoints in it."""
    times = int(mask.any(1).sum())
    inputs = rows.far[: len(mask)], rows.near[: len(mask)]
    far, near, target = (one[mask].to(options.device) for one in (*inputs, rows.target))
    return far, near, target, times


def _parts(data: _Data) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    size = max(1, _PART // (2 * data[0].shape[1]))
    return zip(*(one.split(size) for one in data[:3]), strict=True)


def _differentiate(network: Predictor, data: _Data, options: NextOptions) -> None:
    """Σ|out − target| (or its square) over the number of checkpoints by every parameter."""
    times = data[3]
    for i, (far, near, target) in enumerate(_parts(data)):

        def slope(out: Tensor, target: Tensor = target) -> Tensor:
            gap = out - target
            return gap.sign_().div_(times) if options.loss == "l1" else gap.mul_(2 / times)

        network.differentiate(far, near, slope, keep=float(i > 0))


def _distance(out: Tensor, target: Tensor, options: NextOptions) -> Tensor:
    gap = out - target
    return gap.abs().sum() if options.loss == "l1" else gap.square().sum()


@torch.no_grad()
def _loss_on(network: nn.Module, rows: _Rows, mask: Tensor, options: NextOptions) -> float:
    data = _selected(rows, mask, options)
    return sum(
        float(_distance(network(far, near), target, options)) / data[3]
        for far, near, target in _parts(data)
    )


def _plain_loss(rows: _Rows, mask: Tensor, options: NextOptions, *, near: bool) -> float:
    _, last, target, times = _selected(rows, mask, options)
    guess = last if near else torch.zeros_like(last)
    return float(_distance(guess, target, options)) / times


# --- prediction ---------------------------------------------------------------------------------


@torch.no_grad()
def _raw(
    model: NextModel, examples: Mapping[str, Example], vectors: Mapping[str, VectorExample]
) -> dict[tuple[str, str], Tensor]:
    """(kind, name) → what the networks say at the last checkpoint, fp64."""
    found = {}
    for key, name, far, near, _ in _entries(examples, vectors):
        if key not in model.networks:
            raise OptionError(f"next: no network for {name} ({key}); train with such a tensor")
        out = model.networks[key](far[-1:].float(), near[-1:].float())
        found[key.partition(":")[0], name] = out[0].double()
    return found


def predict(model: NextModel, examples: Mapping[str, Example]) -> dict[str, Pair]:
    """The pair of W_{T+H} − W_T of each tensor: û and v̂ of unit length, σ̂ as it comes.

    The published family is W_T + c·σ̂·û·v̂ᵀ, c = 1 for H checkpoints ahead.
    """
    raw = _raw(model, examples, {})
    return {
        name: Pair(float(raw["sigma", name][0]), _unit(raw["u", name]), _unit(raw["v", name]))
        for name in examples
    }


def predict_vectors(model: NextModel, vectors: Mapping[str, VectorExample]) -> dict[str, Tensor]:
    """W_{T+H} − W_T of norms and biases, (d,) each."""
    raw = _raw(model, {}, vectors)
    return {name: raw["u", name] for name in vectors}


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=0)


def observed(examples: Mapping[str, Known], origin: int, options: NextOptions) -> dict[str, Known]:
    """What was known of every tensor at an origin beyond H, for training as it was possible there.

    Predictions from it are held out for the backtest, with `outer_moves`.
    """
    return {name: one.observed(origin, options.horizon) for name, one in examples.items()}
