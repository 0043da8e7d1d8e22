"""What may be chosen, and who is told what happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.arguments import normalise, numbers, path_of, path_text, size, texts
from geoscope.errors import GeoscopeError, OptionError
from geoscope.metrics import Settings
from geoscope.metrics.thresholds import limits_in_force
from geoscope.names import NameMap, Selection, chosen_layers
from geoscope.records import Report

if TYPE_CHECKING:
    from geoscope.verbs.pairs.prepare import Prepared

__all__ = ["Interrupted", "Options", "Progress"]


@dataclass(frozen=True)
class Options:
    """What may be chosen; every field is an option of the command line.

    include, exclude: patterns; one string is one. layers: block indices, a number or "0-3,7" too.
    map_name: REGEX=REPL each, applied to the names of both sides before they are matched.
    allow_vocab_resize: compare the common rows of embeddings and heads of different height.
    initial_adapter: the adapter before training, where that does not start at zero. lora_alpha: in
    place of the one in adapter_config.json. budget: parameters of an adapter, for which `capacity`
    looks for ranks; nothing is recalled from the cache then.
    ks: subspace dimensions of the @k columns, one or several. quick: leading triplets only; what
    needs a whole spectrum is then not applicable. solver: `auto`, or `exact` for LAPACK's SVD of
    every matrix. max_memory: such as `8GB`, or bytes; default 4 × the largest pair in fp32 + 500
    MB. jobs: worker threads on the CPU; default one a core. limits: thresholds of the verdict, by
    their names.
    cache: folder in which results are kept and found again; None keeps nothing.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: frozenset[int] | None = None
    map_name: Sequence[str] = ()
    allow_vocab_resize: bool = False
    initial_adapter: str | None = None
    lora_alpha: float | None = None
    budget: int | None = None
    ks: tuple[int, ...] = (8, 64)
    device: str = "auto"
    dtype: str = "float64"
    solver: str = "auto"
    max_memory: str | None = None
    jobs: int | None = None
    seed: int = 0
    curves: bool = False
    masks: bool = False
    quick: bool = False
    limits: Mapping[str, float] | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        normalise(
            self,
            **dict.fromkeys(("include", "exclude", "map_name"), texts),
            layers=chosen_layers,
            initial_adapter=path_text,
            ks=numbers,
            max_memory=size,
            cache=path_of,
        )
        if not self.ks or any(k < 1 for k in self.ks):
            raise OptionError(f"`ks` {list(self.ks)}: subspace dimensions are whole numbers from 1")
        NameMap(self.map_name)  # refuses what is no rule
        limits_in_force(self.limits)  # refuses names of thresholds that do not exist
        if self.solver not in ("auto", "exact"):
            raise OptionError(f"`solver` {self.solver!r} is not one of auto, exact")
        if self.quick and self.curves:
            raise OptionError(
                "`quick` takes leading directions only; `curves` needs the whole basis"
            )
        if self.budget is not None and self.budget < 1:
            raise OptionError(f"`budget` {self.budget}: at least one parameter is needed")
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(f"`jobs` {self.jobs}: at least one worker is needed")

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude, self.layers)

    @property
    def settings(self) -> Settings:
        return Settings(
            ks=self.ks,
            solver=self.solver,
            dtype=self.dtype,
            curves=self.curves,
            masks=self.masks,
            quick=self.quick,
            seed=self.seed,
        )


def _ignore(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Progress:
    """Who is told what happens; by default nobody.

    on_fetch(bytes, free bytes of the disk), before downloads that no plan tells of;
    on_download(file, bytes done, bytes in all); on_plan(prepared); on_pair(done, total, name);
    on_recalled(count, total): so many results of a model came from the cache.
    on_network(done, total), as networks are trained. on_note(text): what
    came out on the way.
    """

    on_fetch: Callable[[int, int], None] = _ignore
    on_download: Callable[[str, int, int], None] = _ignore
    on_plan: Callable[[Prepared], None] = _ignore
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
