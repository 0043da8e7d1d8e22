"""From factors to numbers: each metric's value, null and status for each matrix of a stack."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg.perturbed import angle_bound, mean_angles
from geoscope.metrics.factors import PairFactors
from geoscope.metrics.metric import Instance
from geoscope.metrics.nulls import iid_spectra
from geoscope.metrics.precision import floor_status
from geoscope.metrics.spectrum import participation_ratio, top_share
from geoscope.metrics.subspaces import LEAST_GAP
from geoscope.profile import stage
from geoscope.records import Collected, Status

__all__ = ["Measured", "measure", "measure_nothing", "verdict_dimension"]

# Times a first-order bound of what rounding turns: an angle beyond it needs no sample.
_CLEAR = 3.0
# Times the rounding of an entry: as far as it parts equal singular values.
_OPENED = 3.0
_SIDES = ("left", "right")


@dataclass(frozen=True, kw_only=True)
class Measured(Collected):
    """Numbers of one matrix, and the weights by which it enters an aggregate.

    floors: id → the angle that rounding alone may give, where a measured angle is below it.
    weights: `parameters` mn, `update` ‖ΔW‖², `base` ‖W0‖², `tuned` ‖W1‖², `noise` Σulp²/12, `grid`
    what of it is the rounding of grids, `changed` |M|, and `share@k` E_k of the base.
    """

    floors: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


def verdict_dimension(shape: tuple[int, int], rank: int = 0) -> int:
    """k_v = max(1, min(max(64, r), ⌊q/8⌋)): small enough that the nulls stay small."""
    return max(1, min(max(64, rank), min(shape) // 8))


@stage("metrics")
def measure(factors: PairFactors, selected: Sequence[Instance], *, seed: int) -> list[Measured]:
    """Value, null and status of every selected instance, for each matrix of the stack."""
    values = {name: tensor.cpu() for name, tensor in factors.values.items()}
    rows = [Measured(weights=weights) for weights in _weights(values, selected, factors.shape)]
    floors = _Floors(values, factors.shape, seed)
    nothing = [math.nan] * len(rows)
    for instance in selected:
        inside = instance.k is None or instance.k <= min(factors.shape)
        if inside:
            _add_nulls(rows, instance, values, factors.shape)
        known = inside and instance.known(values)
        numbers = instance.call(values, factors.shape).tolist() if known else nothing
        _add_values(rows, instance, numbers, floors)
    return rows


def measure_nothing(
    selected: Iterable[Instance], shape: tuple[int, int], status: Status, *, seed: int
) -> Measured:
    """A matrix that could not be computed: every id null with one status, nulls of the shape."""
    row = Measured(weights={"parameters": float(shape[0] * shape[1])})
    known: dict[str, Tensor] = {"iid.S": iid_spectra(*shape, seed)}
    for instance in selected:
        row.put(instance.id, None, status)
        if instance.k is None or instance.k <= min(shape):
            _add_nulls([row], instance, known, shape)
    return row


def _weights(
    values: Mapping[str, Tensor], selected: Iterable[Instance], shape: tuple[int, int]
) -> list[dict[str, float]]:
    """The weights of each matrix of a stack."""
    norms = values["update.norm"].tolist()
    columns = {
        "parameters": [float(shape[0] * shape[1])] * len(norms),
        "update": _squared(norms),
        "noise": [noise**2 for noise in values["update.noise"].tolist()],
        "grid": [noise**2 for noise in values["update.grid"].tolist()],
    }
    if "base.norm" in values:
        columns["base"] = _squared(values["base.norm"].tolist())
        columns["tuned"] = _squared(values["tuned.norm"].tolist())
    for key, name in (("rank", "rank.max"), ("changed", "masks.changed")):
        if name in values:
            columns[key] = values[name].tolist()
    for instance in selected:
        k = instance.k
        if instance.metric.id == "versus_base@k" and k is not None and k <= min(shape):
            share = top_share(values["base.top"], values["base.norm"], k=k)
            columns[f"share@{k}"] = share.tolist()
    rows = zip(*columns.values(), strict=True)
    weights = [dict(zip(columns, row, strict=True)) for row in rows]
    for row in weights:
        if math.isnan(row.get("changed", 0.0)):
            del row["changed"]  # a grid hides which entries changed
    return weights


def _squared(norms: list[float]) -> list[float]:
    """Raises NumericsError where the square of a norm is not a normal number of fp64."""
    squares = [norm * norm for norm in norms]
    for norm, square in zip(norms, squares, strict=True):
        if norm != 0 and not sys.float_info.min < square < math.inf:
            raise NumericsError(
                f"the norm {norm:.1e} is too large or too small: its square does not fit into "
                "float64; scale the model by a constant first"
            )
    return squares


class _Floors:
    """What decides the status of the numbers of a stack."""

    def __init__(self, values: Mapping[str, Tensor], shape: tuple[int, int], seed: int) -> None:
        self._values, self._shape, self._seed = values, shape, seed
        self._noises, self._norms = (values[f"update.{key}"].tolist() for key in ("noise", "norm"))
        self.zero = [norm == 0 for norm in self._norms]
        self._angles: dict[int, tuple[list[float | None], ...]] = {}

    def statuses(self, instance: Instance, numbers: Sequence[float]) -> list[Status]:
        """The precision status of the numbers of one id of the update."""
        floor = instance.floor
        if floor is None:
            return [Status.OK] * len(numbers)
        if floor == "edge":
            return [Status.OK if value > 0 else Status.BELOW_RESOLUTION for value in numbers]
        if floor == "gap":
            return self._gaps(instance, numbers)
        spread = self._spreads if floor == "amplitude" else [math.nan] * len(numbers)
        return [
            floor_status(floor, *row)
            for row in zip(self._noise_ratios, spread, self._directions, strict=True)
        ]

    @cached_property
    def _noise_ratios(self) -> list[float]:
        pairs = zip(self._noises, self._norms, strict=True)
        return [noise / norm if norm > 0 else math.nan for noise, norm in pairs]

    @cached_property
    def _spreads(self) -> list[float]:
        return participation_ratio(self._values["update.S"]).tolist()

    @cached_property
    def _directions(self) -> list[int]:
        """Those that rounding fills: q, of a product no more than its rank."""
        q = min(self._shape)
        ranks = self._values.get("rank.max")
        return [q] * len(self.zero) if ranks is None else [int(min(q, r)) for r in ranks.tolist()]

    def _gaps(self, instance: Instance, numbers: Sequence[float]) -> list[Status]:
        """A gap that rounding alone may open is the storage's, not the base's."""
        assert instance.k is not None
        last = self._values["base.top"][:, instance.k - 1].tolist()
        noises, entries = self._values["base.noise"].tolist(), math.sqrt(math.prod(self._shape))
        return [
            Status.CAUTION
            if value * kept <= _OPENED * (noise / entries) or value <= LEAST_GAP
            else Status.OK
            for value, kept, noise in zip(numbers, last, noises, strict=True)
        ]

    def angles(self, instance: Instance) -> list[float | None]:
        """What rounding alone may turn each subspace by, where less than that was measured."""
        assert instance.k is not None
        if instance.k not in self._angles:
            self._angles[instance.k] = self._both_angles(instance.k)
        return self._angles[instance.k]["angle_left" not in instance.id]

    def _both_angles(self, k: int) -> tuple[list[float | None], ...]:
        """Left and right: two standard deviations above the mean of what rounding turns."""
        measured = [self._values[f"angles.{side}@{k}"].mean(-1).tolist() for side in _SIDES]
        spectra = [self._spectrum(i) for i in range(len(self.zero))]
        near = []
        for i, (S, noise) in enumerate(zip(spectra, self._noises, strict=True)):
            clear = _CLEAR * angle_bound(S, noise, k=k, shape=self._shape)
            if not self.zero[i] and any(side[i] <= clear for side in measured):
                near.append(i)
        floors: tuple[list[float | None], ...] = tuple([None] * len(spectra) for _ in _SIDES)
        if near:
            noise = torch.tensor([self._noises[i] for i in near], dtype=torch.float64)
            both = mean_angles(
                torch.stack([spectra[i] for i in near]), noise, k=k, shape=self._shape,
                seed=self._seed,
            )  # fmt: skip
            for side, draws, kept in zip(measured, both, floors, strict=True):
                most = draws.mean(-1) + 2 * draws.std(-1)
                for i, floor in zip(near, most.tolist(), strict=True):
                    kept[i] = floor if side[i] < floor else None
        return floors

    def _spectrum(self, i: int) -> Tensor:
        """The base's spectrum; from leading values alone one that turns at least as far.

        Angles grow with the energy next to the cut, and the energy that is not known lies below
        the last known value: as many values as it allows are put there, the rest is 0.
        """
        if "base.S" in self._values:
            return self._values["base.S"][i]
        top, norm = self._values["base.top"][i], self._values["base.norm"][i]
        rest = max(min(self._shape) - len(top), 0)
        energy = float((norm.square() - top.square().sum()).clamp_min(0))
        last = float(top[-1])
        count = min(rest, math.ceil(energy / last**2)) if last > 0 else 0
        return torch.cat([top, top.new_full((count,), last), top.new_zeros(rest - count)])


def _add_values(
    rows: Sequence[Measured], instance: Instance, numbers: Sequence[float], floors: _Floors
) -> None:
    undefined = [math.isnan(value) for value in numbers]
    if any(map(math.isinf, numbers)):
        raise NumericsError(f"{instance.id} overflows fp64")
    turned: Sequence[float | None] = ()
    if instance.floor == "angle" and not all(undefined):
        turned = floors.angles(instance)
        # The same matrix twice has angle 0; what is computed there is rounding of the angle.
        numbers = [0.0 if zero else x for x, zero in zip(numbers, floors.zero, strict=True)]
        statuses = [Status.OK if x is None else Status.BELOW_RESOLUTION for x in turned]
    elif all(undefined):
        statuses = [Status.OK] * len(rows)
    else:
        statuses = floors.statuses(instance, numbers)
    for i, row in enumerate(rows):
        if undefined[i]:
            zero = instance.of_update and floors.zero[i]
            row.put(instance.id, None, Status.ZERO_UPDATE if zero else Status.NOT_APPLICABLE)
            continue
        if turned and (floor := turned[i]) is not None:
            row.floors[instance.id] = floor
        number = round(numbers[i]) if instance.metric.integer else numbers[i]
        row.put(instance.id, number, statuses[i])


def _add_nulls(
    rows: Sequence[Measured],
    instance: Instance,
    values: Mapping[str, Tensor],
    shape: tuple[int, int],
) -> None:
    null = instance.null(values, shape)
    if null is None:
        return
    for row, number in zip(rows, torch.broadcast_to(null, (len(rows),)).tolist(), strict=True):
        if math.isfinite(number):
            row.nulls[instance.id] = number
