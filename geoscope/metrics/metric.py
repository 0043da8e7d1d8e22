"""What a metric is: a pure function of factors, with its null, its floor and its words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, overload

from torch import Tensor

__all__ = ["ROLES", "Instance", "Metric", "Metrics", "Null", "instances", "takes_of"]

ROLES = ("base", "tuned", "update")


@dataclass(frozen=True)
class Null:
    """What noise of the same shape and size gives.

    fn of the factors in `takes` → (b,) or (); with `iid.S` among them (draws, q) the mean over the
    draws is taken. `wants` and `params` as in Metric.
    """

    text: str
    fn: Callable[..., Tensor]
    takes: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One quantity: its function, what it takes, its null, and how to read it.

    id: `@k` stands for a subspace dimension; with `per_role` the id is prefixed by base, tuned and
    update, and `role` in `takes` likewise.
    takes: factors (see factors.py), the arguments of fn in this order. wants: what is passed by
    keyword, of `k` and `shape`. params: constant keyword arguments.
    floor: how storage rounding hurts it (docs/methods.md#floors): top, energy, amplitude, angle;
    edge for a count of what is above the noise, which 0 does not resolve
    (docs/methods.md#noise-edge); gap for one of the base, which its own rounding may make; or
    None. For `per_role` metrics it concerns the update alone.
    aggregate: the rule of docs/methods.md#aggregation by which matrices combine. of_update:
    undefined for a zero update. option: shown only with this command-line option.
    """

    id: str
    fn: Callable[..., Tensor]
    takes: tuple[str, ...]
    family: str
    formula: str
    range: str
    reading: str
    caution: str
    source: str
    null: Null | None = None
    wants: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    per_role: bool = False
    floor: str | None = None
    aggregate: str = "mean"
    of_update: bool = False
    unit: str = ""
    integer: bool = False
    option: str | None = None


class Metrics(tuple[Metric, ...]):
    """All metrics in their order, and by an id, however much of it is filled in: `["lift@64"]`."""

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> Metric: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Metric, ...]: ...

    def __getitem__(self, key: SupportsIndex | slice | str) -> Metric | tuple[Metric, ...]:
        """Raises KeyError with near names."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        role, _, rest = key.partition(".")
        bare = rest if role in ROLES and rest else key
        for one in self:
            if bare == one.id or bare.partition("@")[0] == one.id.removesuffix("@k"):
                return one
        near = [one.id for one in self if bare.partition("@")[0] in one.id][:5]
        hint = f"near: {', '.join(near)}" if near else "`geoscope metrics` lists them all"
        raise KeyError(f"no metric {key!r}; {hint}")


@dataclass(frozen=True)
class Instance:
    """A metric with its id, role and dimension filled in."""

    metric: Metric
    id: str
    takes: tuple[str, ...]
    role: str | None
    k: int | None

    @property
    def floor(self) -> str | None:
        """The precision class of this instance."""
        return self.metric.floor if self.role in (None, "update") else None

    @property
    def of_update(self) -> bool:
        return self.metric.of_update if self.role is None else self.role == "update"

    @property
    def null_takes(self) -> tuple[str, ...]:
        """The factors that the null takes; none without a null."""
        null = self.metric.null
        return tuple(_fill(name, self.role, self.k) for name in null.takes) if null else ()

    def known(self, factors: Mapping[str, Tensor]) -> bool:
        """Whether all that the metric takes is there."""
        return all(name in factors for name in self.takes)

    def call(self, factors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The value, (b,); NaN where undefined."""
        metric = self.metric
        keywords = _keywords(metric.wants, metric.params, self.k, shape)
        return metric.fn(*(factors[name] for name in self.takes), **keywords)

    def null(self, factors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
        """The null, (b,) or (); None when there is none, or a factor of it is absent."""
        null = self.metric.null
        if null is None:
            return None
        takes = self.null_takes
        if any(name not in factors for name in takes):
            return None
        keywords = _keywords(null.wants, null.params, self.k, shape)
        value = null.fn(*(factors[name] for name in takes), **keywords)
        return value.mean(0) if "iid.S" in takes else value


def _keywords(
    wants: tuple[str, ...], params: Mapping[str, Any], k: int | None, shape: tuple[int, int]
) -> dict[str, Any]:
    available = {"k": k, "shape": shape}
    return {**params, **{name: available[name] for name in wants}}


def _fill(name: str, role: str | None, k: int | None) -> str:
    name = name.replace("role", role) if role else name
    return name.replace("@k", f"@{k}")


def instances(metric: Metric, ks: Iterable[int]) -> list[Instance]:
    """All ids of a metric: over the roles and over the dimensions `ks` where it has them."""
    roles = ROLES if metric.per_role else (None,)
    dimensions = tuple(ks) if "@k" in metric.id else (None,)
    return [
        Instance(
            metric,
            _fill(f"{role}.{metric.id}" if role else metric.id, role, k),
            tuple(_fill(name, _noise_role(name, role), k) for name in metric.takes),
            role,
            k,
        )
        for role in roles
        for k in dimensions
    ]


def _noise_role(name: str, role: str | None) -> str | None:
    """The update's spacing is that of the tuned file, which is what was stored."""
    return "tuned" if role == "update" and name == "role.eps" else role


def takes_of(selected: Iterable[Instance]) -> frozenset[str]:
    """The union of the factors that the instances and their nulls take."""
    return frozenset(
        name for instance in selected for name in (*instance.takes, *instance.null_takes)
    )
