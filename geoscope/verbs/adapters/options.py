"""What may be chosen for an initial adapter.

Loads no torch before an object is made: the command line makes its options from these fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from geoscope.adapters.table import INITIALISATIONS, Initialisation
from geoscope.arguments import texts
from geoscope.errors import OptionError
from geoscope.verbs.choices import Memory, Nodes, Resume, Select, form

__all__ = ["RESIDUAL_DTYPES", "InitOptions", "methods_in_words", "methods_without_layout"]

RESIDUAL_DTYPES = ("float32", "bfloat16", "float16")


def methods_in_words() -> str:
    """Every name that `method` takes, with what it starts from."""
    return "; ".join(f"{name}: {each.doc}" for name, each in INITIALISATIONS.items())


def methods_without_layout() -> str:
    """The names of those that leave the base as it is: `rlpo, rlmo and lora`."""
    *names, last = (name for name, each in INITIALISATIONS.items() if not each.needs_layout)
    return f"{', '.join(names)} and {last}"


@dataclass(frozen=True, kw_only=True)
class InitOptions(Resume, Memory, Nodes, Select):
    """Every field is an option of `geoscope init-adapter`.

    The fields of `Select`, `Nodes`, `Memory` and `Resume`, and:
    method: a name in INITIALISATIONS (`geoscope.adapters.table`).
    rank: of the adapter, from 1.
    alpha: lora_alpha; default 2·rank.
    rho, spec_rank, scale_convention: of GeoRA alone; None takes its default.
    targets: last parts of module names, such as q_proj; empty: every linear layer in a block.
    layout: default residual; none for a method that leaves the base as it is.
    residual_dtype: of the rewritten matrices, default float32.
    device: auto, cpu, cuda or cuda:N.
    solver: auto or exact; None takes the default of the method.
    force: replace files of an earlier run.
    """

    method: str = "geora"
    rank: int = 16
    alpha: float | None = None
    rho: float | None = None
    spec_rank: int | None = None
    scale_convention: str | None = None
    targets: Sequence[str] = field(default=(), metadata=form(texts))
    layout: str | None = None
    residual_dtype: str | None = None
    device: str = "auto"
    solver: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        from geoscope.adapters.geora import SCALE_CONVENTIONS

        super().__post_init__()
        if self.method not in INITIALISATIONS:
            known = ", ".join(INITIALISATIONS)
            raise OptionError(f"`method` {self.method!r} is not one of {known}")
        if self.rank < 1:
            raise OptionError(f"`rank` {self.rank}: a rank is a whole number from 1 on")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise OptionError(f"`alpha` {self.alpha:g}: lora_alpha is a finite number above 0")
        if self.solver not in (None, "auto", "exact"):
            raise OptionError(f"`solver` {self.solver!r} is not one of auto, exact")
        self._check_layout()
        _ = self.selection  # refuses what is not a regular expression
        for name in self._set_of_methods():
            if name not in self.initialisation.options:
                raise OptionError(f"`{name}` has no effect on `method` {self.method}; leave it out")
        if self.rho is not None and not 0 < self.rho < 1:
            raise OptionError(f"`rho` {self.rho:g}: it lies between 0 and 1, such as 0.2")
        if self.spec_rank is not None and self.spec_rank < 1:
            raise OptionError(f"`spec_rank` {self.spec_rank}: a rank is a whole number from 1 on")
        if self.scale_convention not in (None, *SCALE_CONVENTIONS):
            known = ", ".join(SCALE_CONVENTIONS)
            raise OptionError(f"`scale_convention` {self.scale_convention!r} is not one of {known}")

    def _set_of_methods(self) -> list[str]:
        """The fields that some method takes as an option and that were set.

        `seed` has a default of its own: it is also that of the sampled nulls.
        """
        of_methods = {name for each in INITIALISATIONS.values() for name in each.options}
        optional = [each.name for each in fields(self) if each.default is None]
        return [name for name in optional if name in of_methods and getattr(self, name) is not None]

    def _check_layout(self) -> None:
        from geoscope.adapters.layouts import LAYOUTS

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
    def method_options(self) -> dict[str, Any]:
        """What the initialisation takes beside rank and alpha, defaults filled in."""
        given = {name: getattr(self, name, None) for name in self.initialisation.options}
        return {
            name: default if given[name] is None else given[name]
            for name, default in self.initialisation.options.items()
        }
