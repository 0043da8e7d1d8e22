"""What may be chosen, and who is told what happens.

Loads no torch: the command line makes its options from these fields, and help must not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from geoscope.arguments import numbers
from geoscope.errors import GeoscopeError, OptionError
from geoscope.records import Report
from geoscope.verbs.choices import Compute, Memory, Rename, Resume, Select, Start, form

if TYPE_CHECKING:
    from geoscope.metrics import Settings

__all__ = ["Interrupted", "Options", "Planned", "Progress"]

# Options that say how fast the numbers come, and what is of one machine alone.
_LOCAL = ("jobs", "max_memory", "cache", "device", "ray")


@dataclass(frozen=True, kw_only=True)
class Options(Resume, Memory, Compute, Rename, Start, Select):
    """What may be chosen for a comparison; every field is an option of the command line.

    The fields of `Select`, `Start`, `Rename`, `Compute`, `Memory` and `Resume`, and:
    allow_vocab_resize: compare the common rows of embeddings and heads of different height.
    budget: parameters of an adapter, for which `capacity` looks for ranks; nothing is recalled
    from the cache then.
    ks: subspace dimensions of the @k columns, one or several.
    device: auto, cpu, cuda (all), cuda:N or mps.
    dtype: of the spectra, float64 or float32.
    solver: `auto`, or `exact` for LAPACK's SVD of every matrix.
    curves: captured energy over the base's whole basis.
    masks: overlap of changed weights with masks.
    quick: leading triplets only; what needs a whole spectrum is then not applicable.
    limits: thresholds of the verdict, by their names.
    ray: address of a Ray cluster that computes, `auto` or `local`; None for this process.
    """

    allow_vocab_resize: bool = False
    budget: int | None = None
    ks: tuple[int, ...] = field(default=(8, 64), metadata=form(numbers))
    device: str = "auto"
    dtype: str = "float64"
    solver: str = "auto"
    curves: bool = False
    masks: bool = False
    quick: bool = False
    limits: Mapping[str, float] | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ks or any(k < 1 for k in self.ks):
            raise OptionError(f"`ks` {list(self.ks)}: subspace dimensions are whole numbers from 1")
        _check_limits(self.limits)
        if self.solver not in ("auto", "exact"):
            raise OptionError(f"`solver` {self.solver!r} is not one of auto, exact")
        if self.quick and self.curves:
            raise OptionError(
                "`quick` takes leading directions only; `curves` needs the whole basis"
            )
        if self.budget is not None and self.budget < 1:
            raise OptionError(f"`budget` {self.budget}: at least one parameter is needed")

    @property
    def deciding(self) -> dict[str, Any]:
        """Those that decide the numbers, and not how fast they come, as JSON has them."""
        named = [each.name for each in fields(self) if each.name not in _LOCAL]
        every = {name: getattr(self, name) for name in named}
        every["initial_adapter"] = self.start_name
        every["layers"] = None if self.layers is None else sorted(self.layers)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in every.items()}

    @property
    def settings(self) -> Settings:
        from geoscope.metrics import Settings

        return Settings(
            ks=self.ks,
            solver=self.solver,
            dtype=self.dtype,
            curves=self.curves,
            masks=self.masks,
            quick=self.quick,
            seed=self.seed,
        )


def _check_limits(limits: Mapping[str, float] | None) -> None:
    """Refuses names of thresholds that do not exist."""
    if limits:
        from geoscope.thresholds import limits_in_force

        limits_in_force(limits)


def _ignore(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Planned:
    """What is going to be computed, before it is.

    base: as it was given; None where it is not read.
    tuned: as it was given.
    matrices: how many.
    device: the devices by name.
    bytes_to_fetch: from the Hub.
    free_disk: bytes where they go, None where nothing is to be fetched.
    notes: remarks on the models and on the pair.
    """

    base: str | None
    tuned: str
    matrices: int
    device: str
    bytes_to_fetch: int
    free_disk: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """Who is told what happens; by default nobody.

    on_fetch: (bytes, free bytes of the disk), before downloads that no plan tells of.
    on_download: (file, bytes done, bytes in all).
    on_plan: (what is going to be computed).
    on_pair: (done, total, name).
    on_recalled: (count, total): so many results of a model came from the cache.
    on_network: (done, total), as networks are trained.
    on_note: (text): what came out on the way.
    """

    on_fetch: Callable[[int, int], None] = _ignore
    on_download: Callable[[str, int, int], None] = _ignore
    on_plan: Callable[[Planned], None] = _ignore
    on_pair: Callable[[int, int, str], None] = _ignore
    on_recalled: Callable[[int, int], None] = _ignore
    on_network: Callable[[int, int], None] = _ignore
    on_note: Callable[[str], None] = _ignore


class Interrupted(GeoscopeError):
    """Stopped by a signal; `report` holds what was finished until then (None: nothing was)."""

    def __init__(self, report: Report | None, signum: int) -> None:
        done = len(report.layers) if report else 0
        super().__init__(f"interrupted after {done} matrices")
        self.report = report
        self.signum = signum
