"""What may be chosen for an initial adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geoscope.adapters.geora import SCALE_CONVENTIONS
from geoscope.adapters.layouts import LAYOUTS
from geoscope.adapters.table import INITIALISATIONS, Initialisation
from geoscope.arguments import normalise, texts
from geoscope.errors import OptionError
from geoscope.names import Selection, chosen_layers

__all__ = ["RESIDUAL_DTYPES", "InitOptions"]

RESIDUAL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class InitOptions:
    """Every field is an option of `geoscope init-adapter`.

    alpha: default 2·rank. rho, spec_rank, scale_convention: of GeoRA alone; None takes its default.
    include, exclude, targets: one string is one; layers as in `Options`.
    targets: last parts of module names, such as q_proj; empty: every linear layer in a block.
    layout: default residual, none for a method that leaves the base as it is. residual_dtype: of
    the rewritten matrices, default float32. jobs: worker threads on the CPU; default one a core.
    """

    method: str = "geora"
    rank: int = 16
    alpha: float | None = None
    rho: float | None = None
    spec_rank: int | None = None
    scale_convention: str | None = None
    targets: Sequence[str] = ()
    layout: str | None = None
    residual_dtype: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: frozenset[int] | None = None
    device: str = "auto"
    solver: str | None = None
    seed: int = 0
    jobs: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        normalise(self, targets=texts, include=texts, exclude=texts, layers=chosen_layers)
        if self.method not in INITIALISATIONS:
            known = ", ".join(INITIALISATIONS)
            raise OptionError(f"`method` {self.method!r} is not one of {known}")
        if self.rank < 1:
            raise OptionError(f"`rank` {self.rank}: a rank is a whole number from 1 on")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise OptionError(f"`alpha` {self.alpha:g}: lora_alpha is a finite number above 0")
        if self.solver not in (None, "auto", "exact"):
            raise OptionError(f"`solver` {self.solver!r} is not one of auto, exact")
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(f"`jobs` {self.jobs}: at least one worker is needed")
        self._check_layout()
        _ = self.selection  # refuses what is no regular expression
        for name in ("rho", "spec_rank", "scale_convention", "solver"):
            if getattr(self, name) is not None and name not in self.initialisation.options:
                raise OptionError(f"`{name}` has no effect on `method` {self.method}; leave it out")
        if self.rho is not None and not 0 < self.rho < 1:
            raise OptionError(f"`rho` {self.rho:g}: it lies between 0 and 1, such as 0.2")
        if self.spec_rank is not None and self.spec_rank < 1:
            raise OptionError(f"`spec_rank` {self.spec_rank}: a rank is a whole number from 1 on")
        if self.scale_convention not in (None, *SCALE_CONVENTIONS):
            known = ", ".join(SCALE_CONVENTIONS)
            raise OptionError(f"`scale_convention` {self.scale_convention!r} is not one of {known}")

    def _check_layout(self) -> None:
        if self.layout is not None and not self.initialisation.needs_layout:
            raise OptionError(
                f"`method` {self.method} leaves the base as it is and has no layout; "
                "leave `layout` out"
            )
        if self.layout not in (None, *LAYOUTS):
            raise OptionError(f"`layout` {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        if self.residual_dtype is None:
            return
        if self.chosen_layout != "residual":
            raise OptionError("`residual_dtype` is for `layout` residual, which rewrites the base")
        if self.residual_dtype not in RESIDUAL_DTYPES:
            known = ", ".join(RESIDUAL_DTYPES)
            raise OptionError(f"`residual_dtype` {self.residual_dtype!r} is not one of {known}")

    @property
    def initialisation(self) -> Initialisation:
        return INITIALISATIONS[self.method]

    @property
    def chosen_layout(self) -> str:
        """residual, mirror or anchor; empty for a method without one."""
        return (self.layout or "residual") if self.initialisation.needs_layout else ""

    @property
    def chosen_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def written_rank(self) -> int:
        """Rank of the adapter that is written: twice as large for a mirror."""
        return 2 * self.rank if self.chosen_layout == "mirror" else self.rank

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude, self.layers)

    @property
    def method_options(self) -> dict[str, Any]:
        """What the initialisation takes beside rank and alpha, defaults filled in."""
        given = {name: getattr(self, name, None) for name in self.initialisation.options}
        return {
            name: default if given[name] is None else given[name]
            for name, default in self.initialisation.options.items()
        }
