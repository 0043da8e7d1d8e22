"""INITIALISATIONS: every way to start an adapter, by the name that `--method` takes.

Loads no torch before one is called: options and help are made of this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from geoscope.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from geoscope.adapters.factors import LoraFactors

__all__ = ["INITIALISATIONS", "Initialisation", "starts_on_base"]


@dataclass(frozen=True)
class Initialisation:
    """function(W, rank, alpha=…, **options) → LoraFactors.

    place: module in `geoscope.adapters` and name of the function in it, such as `rlpo.rlmo`.
    options: what the function takes beside rank and alpha, with its defaults.
    needs_layout: whether s·B0·A0 ≠ 0, so that a layout has to make up for it; without one the base
    stays as it is.
    doc: one line for help texts.
    is_drawn: whether the factors are random, so that each matrix needs a seed of its own.
    """

    place: str
    options: Mapping[str, Any]
    needs_layout: bool
    doc: str
    is_drawn: bool = False

    @property
    def function(self) -> Callable[..., LoraFactors]:
        module, _, name = self.place.partition(".")
        return getattr(import_module(f"geoscope.adapters.{module}"), name)

    def __call__(
        self, W: Tensor, rank: int, *, alpha: float | None = None, **options: Any
    ) -> LoraFactors:
        """The initial factors. Raises OptionError for an option that this one does not take."""
        if strange := sorted(set(options) - set(self.options)):
            name, known = self.place.partition(".")[2], ", ".join(self.options) or "none"
            raise OptionError(f"{name} does not take {', '.join(strange)}; its options: {known}")
        return self.function(W, rank, alpha=alpha, **options)


_SOLVER = {"solver": "auto"}

INITIALISATIONS: dict[str, Initialisation] = {
    "geora": Initialisation(
        "geora.geora",
        {"rho": 0.2, "spec_rank": None, "scale_convention": "geora", **_SOLVER, "seed": 0},
        needs_layout=True,
        doc="principal triplets of the entries that are small in W or in its leading part",
    ),
    "pissa": Initialisation(
        "pissa.pissa", _SOLVER, needs_layout=True, doc="principal triplets of W, as PEFT does"
    ),
    "milora": Initialisation("milora.milora", _SOLVER, needs_layout=True, doc="last triplets of W"),
    "olora": Initialisation(
        "olora.olora", _SOLVER, needs_layout=True, doc="leading part of W = QR, as PEFT does"
    ),
    "rlpo": Initialisation(
        "rlpo.rlpo",
        {**_SOLVER, "seed": 0},
        needs_layout=False,
        doc="leading right directions of W as A, and B = 0",
    ),
    "rlmo": Initialisation(
        "rlpo.rlmo",
        {**_SOLVER, "seed": 0},
        needs_layout=False,
        doc="last right directions of W as A, and B = 0",
    ),
    "lora": Initialisation(
        "lora.lora",
        {"seed": 0},
        needs_layout=False,
        doc="random A and B = 0, as PEFT does",
        is_drawn=True,
    ),
}


def starts_on_base(method: object) -> bool:
    """Whether an adapter that a method of this name began stands on the original base as it is."""
    known = INITIALISATIONS.get(method) if isinstance(method, str) else None
    return known is not None and not known.needs_layout
