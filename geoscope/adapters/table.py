"""INITIALISATIONS: every way to start an adapter, by the name that `--method` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.geora import geora
from geoscope.adapters.lora import lora
from geoscope.adapters.milora import milora
from geoscope.adapters.olora import olora
from geoscope.adapters.pissa import pissa
from geoscope.adapters.rlpo import rlmo, rlpo
from geoscope.errors import OptionError

__all__ = ["INITIALISATIONS", "Initialisation", "starts_on_base"]


@dataclass(frozen=True)
class Initialisation:
    """function(W, rank, alpha=…, **options) → LoraFactors.

    options: what the function takes beside rank and alpha, with its defaults. needs_layout: whether
    s·B0·A0 ≠ 0, so that a layout has to make up for it; without one the base stays as it is.
    is_drawn: whether the factors are random, so that each matrix needs a seed of its own. doc: one
    line for help texts.
    """

    function: Callable[..., LoraFactors]
    options: Mapping[str, Any]
    needs_layout: bool
    doc: str
    is_drawn: bool = False

    def __call__(
        self, W: Tensor, rank: int, *, alpha: float | None = None, **options: Any
    ) -> LoraFactors:
        """The initial factors. Raises OptionError for an option that this one does not take."""
        if strange := sorted(set(options) - set(self.options)):
            name, known = self.function.__name__, ", ".join(self.options) or "none"
            raise OptionError(f"{name} does not take {', '.join(strange)}; its options: {known}")
        return self.function(W, rank, alpha=alpha, **options)


_SOLVER = {"solver": "auto"}

INITIALISATIONS: dict[str, Initialisation] = {
    "geora": Initialisation(
        geora,
        {"rho": 0.2, "spec_rank": None, "scale_convention": "geora", **_SOLVER, "seed": 0},
        needs_layout=True,
        doc="principal triplets of the entries that are small in W or in its leading part",
    ),
    "pissa": Initialisation(
        pissa, _SOLVER, needs_layout=True, doc="principal triplets of W, as PEFT does"
    ),
    "milora": Initialisation(milora, _SOLVER, needs_layout=True, doc="last triplets of W"),
    "olora": Initialisation(
        olora, _SOLVER, needs_layout=True, doc="leading part of W = QR, as PEFT does"
    ),
    "rlpo": Initialisation(
        rlpo,
        {**_SOLVER, "seed": 0},
        needs_layout=False,
        doc="leading right directions of W as A, and B = 0",
    ),
    "rlmo": Initialisation(
        rlmo,
        {**_SOLVER, "seed": 0},
        needs_layout=False,
        doc="last right directions of W as A, and B = 0",
    ),
    "lora": Initialisation(
        lora,
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
