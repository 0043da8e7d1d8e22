"""How does an IA3 adapter of PEFT store its update? As a vector that multiplies the base weight.

<module>.ia3_l (out, 1)      W′ = diag(l)·W, and b′ = l ⊙ b
<module>.ia3_l (1, in)       W′ = W·diag(l): `feedforward_modules`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError
from geoscope.peft.extras import Vector
from geoscope.peft.keys import by_module, refuse_flat
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ia3Module", "ia3_modules"]


@dataclass(frozen=True, kw_only=True)
class Ia3Module(AdapterModule):
    """A module with IA3. The side that l does not run along is unknown, 0, without the base."""

    scale: TensorInfo

    @property
    def kind(self) -> Kind:
        return "base"

    @property
    def called(self) -> str:
        return "IA3"

    @property
    def vectors(self) -> Mapping[str, Vector]:
        if self.scale.shape[1] != 1:
            return {}
        return {f"{self.name}.bias": Vector(self.scale.name, multiplies=True)}

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        raise self.no_factors()

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        self.check_fits(tuple(weight.shape))
        return weight.double() * read(self.scale.name).double()


def ia3_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, Ia3Module]:
    """Every adapted module by name. Raises CheckpointError for what are no rows or columns."""
    found = {path: roles["ia3_l"] for path, roles in by_module(tensors, ("ia3_l",), label).items()}
    refuse_flat(found.values(), label)
    modules: dict[str, Ia3Module] = {}
    for path, scale in found.items():
        m, n = scale.shape
        if 1 not in (m, n):
            raise CheckpointError(
                f"{label}: {scale.name} is {scale.shape}, and is neither (out, 1) nor (1, in); "
                "save the adapter again"
            )
        sides = (m, 0) if n == 1 else (0, n)
        modules[path] = Ia3Module(
            name=path, path=path, shape=sides, rank=0, scaling=1.0, stored=(scale,), scale=scale
        )
    return modules
