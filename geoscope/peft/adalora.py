"""How does an AdaLoRA adapter of PEFT store its update? As a singular value decomposition.

    <module>.lora_A (r, in), <module>.lora_E (r, 1), <module>.lora_B (out, r)

ΔW = s·B·diag(E)·A with s = alpha/(r₀ + 1e-5), r₀ = `init_r` before pruning, and alpha = r₀ where
`lora_alpha` is not positive. What was pruned is not saved: `rank_pattern` has a mask a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError
from geoscope.foreign import NUMBER, shown
from geoscope.names import without_wrappers
from geoscope.peft.keys import by_module, refuse_flat, refuse_partial
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaLoraModule", "adalora_modules"]

_ROLES = ("lora_A", "lora_B", "lora_E")
_RANKNUM_GUARD = 1e-5  # which PEFT adds to r₀


@dataclass(frozen=True, kw_only=True)
class AdaLoraModule(AdapterModule):
    """A module with AdaLoRA: update = scaling · B·(E ⊙ A), E multiplied in on reading."""

    A: TensorInfo
    B: TensorInfo
    E: TensorInfo

    @property
    def kind(self) -> Kind:
        return "factors"

    @property
    def called(self) -> str:
        return "AdaLoRA"

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """In fp64; a module that is pruned to rank 0 has one column and row of zeros."""
        B, A, E = (read(one.name).double() for one in (self.B, self.A, self.E))
        if self.rank == 0:
            return B.new_zeros(1, self.shape[0], 1), A.new_zeros(1, 1, self.shape[1])
        return B[None], (E * A)[None]


def adalora_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, AdaLoraModule]:
    """Every adapted module by name. Raises CheckpointError for factors that lack their partners or
    contradict the config."""
    start = _positive(config, "init_r", label)
    alpha: Any = config.get("lora_alpha")
    if not NUMBER.holds(alpha):
        raise CheckpointError(
            f"{label}: lora_alpha is {shown(alpha)} in adapter_config.json, and must be a number; "
            "set it there to what the adapter was trained with"
        )
    scaling = (alpha if alpha > 0 else start) / (start + _RANKNUM_GUARD)
    found = by_module(tensors, _ROLES, label)
    refuse_partial(found, _ROLES, label)
    kept = _kept(config, label)
    modules: dict[str, AdaLoraModule] = {}
    for path, roles in found.items():
        A, B, E = (roles[one] for one in _ROLES)
        # What is pruned to nothing has no rows: that is not a sign of shards.
        if kept.get(path) != 0:
            refuse_flat((A, B, E), label)
        rank = A.shape[0]
        if (B.shape[1:], E.shape) != ((rank,), (rank, 1)) or rank not in (start, kept.get(path)):
            raise CheckpointError(
                f"{label}: {path} has lora_A {A.shape}, lora_E {E.shape} and lora_B {B.shape}, the "
                f"config rank {kept.get(path, start)}; factors and adapter_config.json are of "
                "different saves: copy both again"
            )
        modules[path] = AdaLoraModule(
            name=path,
            path=path,
            shape=(B.shape[0], A.shape[1]),
            rank=rank,
            scaling=scaling,
            stored=(A, B, E),
            alpha=float(alpha),
            A=A,
            B=B,
            E=E,
        )
    return modules


def _positive(config: Mapping[str, Any], field: str, label: str) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{label}: {field} is {shown(value)} in adapter_config.json, and must be a number "
            "above 0; set it there to what the adapter was trained with"
        )
    return value


def _kept(config: Mapping[str, Any], label: str) -> dict[str, int]:
    """Path of a module → its rank after pruning, from the masks of `rank_pattern`."""
    masks = config.get("rank_pattern") or {}
    if not isinstance(masks, Mapping) or not all(isinstance(one, list) for one in masks.values()):
        raise CheckpointError(
            f"{label}: rank_pattern in adapter_config.json is not a table of masks, as AdaLoRA has "
            "it; copy adapter_config.json again"
        )
    return {
        without_wrappers(name).partition(".lora_E")[0]: sum(map(bool, mask))
        for name, mask in masks.items()
    }
