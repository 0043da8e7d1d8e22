"""How does a TinyLoRA adapter of PEFT store its update? As a few numbers in the base's own SVD.

    <module>.tinylora_B (out, r), .tinylora_A (r, in)    U·√S and √S·Vᵀ of the base, frozen
    <module>.tinylora_P (u, r, r)                        random, frozen
    base_model.tinylora_v.<group> (u,)                   trained; shared by the modules of a group

ΔW = B·(Σ_i v_i·P_i)·A. The group of a module follows from its place among the modules of the live
model, which no file tells. But P is drawn from `projection_seed` plus that place, so P tells it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.peft.keys import MERGE, by_module, refuse_flat, refuse_partial
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TinyLoraModule", "tinylora_modules"]

_FACTORS = ("tinylora_A", "tinylora_B")
_ROLES = (*_FACTORS, "tinylora_P")
_TRAINED = re.compile(r"base_model\.tinylora_v(?:\.[^.]+)?\.(?P<group>\d+)")


@dataclass(frozen=True, kw_only=True)
class TinyLoraModule(AdapterModule):
    """A module with TinyLoRA. groups: the trained vectors, by number. seed: `projection_seed`.
    count: of the adapted modules."""

    A: TensorInfo
    B: TensorInfo
    P: TensorInfo
    groups: tuple[TensorInfo, ...]
    seed: int
    count: int

    @property
    def kind(self) -> Kind:
        return "factors"

    @property
    def called(self) -> str:
        return "TinyLoRA"

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """B as stored, and (Σ_i v_i·P_i)·A in fp64. Raises CheckpointError where P is not drawn."""
        P = read(self.P.name)
        v = read(self._trained(P).name).double()
        core = (v[:, None, None] * P.double()).sum(0)
        return read(self.B.name)[None], (core @ read(self.A.name).double())[None]

    def _trained(self, P: Tensor) -> TensorInfo:
        if len(self.groups) == 1:
            return self.groups[0]
        size = max(1, self.count // len(self.groups))
        return self.groups[min(self._place(P) // size, len(self.groups) - 1)]

    def _place(self, P: Tensor) -> int:
        """Which of the adapted modules this is: the one whose draw P is."""
        import torch

        for place in range(self.count):
            generator = torch.Generator(device="cpu").manual_seed(self.seed + place)
            drawn = torch.normal(
                mean=0.0, std=1.0 / (P.shape[-1] ** 0.5), size=tuple(P.shape), generator=generator
            )
            if torch.equal(drawn.to(P.dtype), P):
                return place
        raise CheckpointError(
            f"{self.name}: {self.P.name} does not match projection_seed {self.seed}, so the "
            "trained vector of this module is unknown; copy adapter_config.json again"
        )


def tinylora_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, TinyLoraModule]:
    """Every adapted module by name. Raises CheckpointError for tensors that do not belong together,
    UnsupportedFormat where P was not saved."""
    found = by_module(tensors, _ROLES, label)
    refuse_partial(found, _FACTORS, label)
    if lacking := [path for path, roles in found.items() if "tinylora_P" not in roles]:
        raise UnsupportedFormat(
            f"{label}: {len(lacking)} modules have no tinylora_P, first {lacking[0]}. PEFT would "
            "draw it from the module's position in the live model, which is not stored. Train with "
            f"save_projection. {MERGE}"
        )
    groups, seed = _groups(tensors, label), config.get("projection_seed")
    if type(seed) is not int:
        raise CheckpointError(
            f"{label}: projection_seed is {seed!r} in adapter_config.json, and must be a whole "
            "number; copy adapter_config.json again"
        )
    modules: dict[str, TinyLoraModule] = {}
    for path, roles in found.items():
        A, B, P = (roles[one] for one in _ROLES)
        refuse_flat((A, B), label)
        rank = A.shape[0]
        if (B.shape[1], P.shape) != (rank, (groups[0].shape[0], rank, rank)):
            raise CheckpointError(
                f"{label}: {path} has tinylora_A {A.shape}, tinylora_B {B.shape} and tinylora_P "
                f"{P.shape}, the trained vector {groups[0].shape}; copy the file again"
            )
        modules[path] = TinyLoraModule(
            name=path,
            path=path,
            shape=(B.shape[0], A.shape[1]),
            rank=rank,
            scaling=1.0,
            stored=(A, B, P, *groups),
            A=A,
            B=B,
            P=P,
            groups=groups,
            seed=seed,
            count=len(found),
        )
    return modules


def _groups(tensors: Mapping[str, TensorInfo], label: str) -> tuple[TensorInfo, ...]:
    """The trained vectors in the order of their numbers."""
    found: dict[int, TensorInfo] = {}
    for name, info in tensors.items():
        # The wrappers take off the prefix of a module, which this key has not.
        match = _TRAINED.search(name)
        if match is not None and name.endswith(match[0]):
            found[int(match["group"])] = info
    is_whole = sorted(found) == list(range(len(found)))
    if not found or not is_whole or len({one.shape for one in found.values()}) > 1:
        raise CheckpointError(
            f"{label}: holds {len(found)} trained vectors (tinylora_v), not one for each group; "
            "copy the file again"
        )
    return tuple(found[group] for group in sorted(found))
