"""From factors to numbers: each metric's value, null and status for each matrix of a stack."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
    count = len(values["update.norm"])
    rows = [Measured(weights=_weights(values, selected, factors.shape, i)) for i in range(count)]
    floors = _Floors(values, factors.shape, seed)
    for instance in selected:
        inside = instance.k is None or instance.k <= min(factors.shape)
        if inside:
            _add_nulls(rows, instance, values, factors.shape)
        if not inside or not instance.known(values):
            for i, row in enumerate(rows):
                zero = instance.of_update and floors.zero[i]
                row.put(instance.id, None, Status.ZERO_UPDATE if zero else Status.NOT_APPLICABLE)
            continue
        numbers = instance.call(values, factors.shape)
        for i, row in enumerate(rows):
            _add_value(row, instance, float(numbers[i]), floors, i)
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
    values: Mapping[str, Tensor], selected: Iterable[Instance], shape: tuple[int, int], i: int
) -> dict[str, float]:
    weights = {
        "parameters": float(shape[0] * shape[1]),
        "update": _squared(values["update.norm"][i]),
        "noise": float(values["update.noise"][i]) ** 2,
        "grid": float(values["update.grid"][i]) ** 2,
    }
    if "base.norm" in values:
        weights["base"] = _squared(values["base.norm"][i])
        weights["tuned"] = _squared(values["tuned.norm"][i])
    if "rank.max" in values:
        weights["rank"] = float(values["rank.max"][i])
    if "masks.changed" in values:
        weights["changed"] = float(values["masks.changed"][i])
    for instance in selected:
        k = instance.k
        if instance.metric.id == "versus_base@k" and k is not None and k <= min(shape):
            share = top_share(values["base.top"][i], values["base.norm"][i], k=k)
            weights[f"share@{k}"] = float(share)
    return weights


def _squared(norm: Tensor) -> float:
    """Raises NumericsError where the square of a norm is not a normal number of fp64."""
    square = float(norm) * float(norm)
    if float(norm) != 0 and not sys.float_info.min < square < math.inf:
        raise NumericsError(f"a norm of {float(norm):.1e}: squares of the weights leave fp64")
    return square


@dataclass(frozen=True)
class _Floors:
    """What decides the status of the numbers of a stack."""

    values: Mapping[str, Tensor]
    shape: tuple[int, int]
    seed: int

    @property
    def zero(self) -> list[bool]:
        return (self.values["update.norm"] == 0).tolist()

    def of(self, instance: Instance, i: int, value: float) -> Status:
        """The precision status of one number of the update."""
        if instance.floor is None:
            return Status.OK
        if instance.floor == "edge":
            return Status.OK if value > 0 else Status.BELOW_RESOLUTION
        if instance.floor == "gap":
            return self._gap(instance, i, value)
        norm = float(self.values["update.norm"][i])
        noise_ratio = float(self.values["update.noise"][i]) / norm if norm > 0 else math.nan
        spread = math.nan
        if instance.floor == "amplitude":
            spread = float(participation_ratio(self.values["update.S"][i]))
        return floor_status(instance.floor, noise_ratio, spread, self._directions(i))

    def _directions(self, i: int) -> int:
        """Those that rounding fills: q, of a product no more than its rank."""
        rank = float(self.values["rank.max"][i]) if "rank.max" in self.values else math.inf
        return int(min(*self.shape, rank))

    def _gap(self, instance: Instance, i: int, value: float) -> Status:
        """A gap that rounding alone may open is the storage's, not the base's."""
        assert instance.k is not None
        step = value * float(self.values["base.top"][i, instance.k - 1])
        noise = float(self.values["base.noise"][i]) / math.sqrt(math.prod(self.shape))
        made = step <= _OPENED * noise or value <= LEAST_GAP
        return Status.CAUTION if made else Status.OK

    def angle(self, instance: Instance, i: int) -> float | None:
        """What rounding alone may turn the subspace by, where less than that was measured.

        Two standard deviations above its mean.
        """
        assert instance.k is not None
        k, side = instance.k, "left" if "angle_left" in instance.id else "right"
        measured = float(self.values[f"angles.{side}@{k}"][i].mean())
        S, noise = self._spectrum(i), float(self.values["update.noise"][i])
        if measured > _CLEAR * angle_bound(S, noise, k=k, shape=self.shape):
            return None
        turned = mean_angles(S, noise, k=k, shape=self.shape, seed=self.seed)[side == "right"]
        floor = float(turned.mean() + 2 * turned.std())
        return floor if measured < floor else None

    def _spectrum(self, i: int) -> Tensor:
        """The base's spectrum; from leading values alone one that turns at least as far.

        Angles grow with the energy next to the cut, and the energy that is not known lies below
        the last known value: as many values as it allows are put there, the rest is 0.
        """
        if "base.S" in self.values:
            return self.values["base.S"][i]
        top, norm = self.values["base.top"][i], self.values["base.norm"][i]
        rest = max(min(self.shape) - len(top), 0)
        energy = float((norm.square() - top.square().sum()).clamp_min(0))
        last = float(top[-1])
        count = min(rest, math.ceil(energy / last**2)) if last > 0 else 0
        return torch.cat([top, top.new_full((count,), last), top.new_zeros(rest - count)])


def _add_value(row: Measured, instance: Instance, value: float, floors: _Floors, i: int) -> None:
    if math.isnan(value):
        zero = instance.of_update and floors.zero[i]
        row.put(instance.id, None, Status.ZERO_UPDATE if zero else Status.NOT_APPLICABLE)
        return
    if math.isinf(value):
        raise NumericsError(f"{instance.id} overflows fp64")
    if instance.floor == "angle":
        # The same matrix twice has angle 0; what is computed there is rounding of the angle.
        value = 0.0 if floors.zero[i] else value
        floor = None if floors.zero[i] else floors.angle(instance, i)
        status = Status.OK if floor is None else Status.BELOW_RESOLUTION
        if floor is not None:
            row.floors[instance.id] = floor
    else:
        status = floors.of(instance, i, value)
    number = round(value) if instance.metric.integer else value
    row.put(instance.id, number, status)


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
