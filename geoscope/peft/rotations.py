"""How do OFT and BOFT adapters of PEFT store their updates? As rotations of the inputs.

    <module>.oft_R.weight (blocks, b(b − 1)/2)      W′ = W·Rᵀ, R of b × b blocks, each from the
        entries above the diagonal of a skew Q; one block for all with `block_share`
    <module>.oft_embedding_R.weight                 an embedding (vocab, dim): W′ = W·R
    <module>.boft_R (N, D, b, b), .boft_s (out, 1)  W′ = diag(s)·W·Bᵀ, B = B_N·…·B_1, each of D
        blocks between two permutations (a butterfly)

A block is Cayley's (I − Q)(I + Q)⁻¹, in OFT by default its series with `num_cayley_neumann_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError
from geoscope.peft.keys import by_module, refuse_flat, refuse_partial
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BoftModule", "OftModule", "boft_modules", "oft_modules"]

_OFT = ("oft_R", "oft_embedding_R")
_BOFT = ("boft_R", "boft_s")


@dataclass(frozen=True, kw_only=True)
class OftModule(AdapterModule):
    """A module with OFT. size: b. terms: of the series, None for the whole of it. largest: the
    bound on ‖Q‖ of all blocks, of `coft`, else None. is_shared: whether one block serves all."""

    angles: TensorInfo
    size: int
    terms: int | None
    largest: float | None
    is_shared: bool = False
    is_embedding: bool = False

    @property
    def kind(self) -> Kind:
        return "base"

    @property
    def called(self) -> str:
        return "OFT"

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        raise self.no_factors()

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        self.check_fits(tuple(weight.shape))
        m, n = weight.shape
        if n % self.size:
            raise CheckpointError(
                f"{self.name}: its {n} inputs in the base are not cut into blocks of {self.size}; "
                "give the model that the adapter was trained on"
            )
        R = self._blocks(read(self.angles.name).double())
        R = R if self.is_embedding else R.mT
        parts = weight.double().reshape(m, n // self.size, self.size).transpose(0, 1)
        return (parts @ R).transpose(0, 1).reshape(m, n)

    def _blocks(self, angles: Tensor) -> Tensor:
        import torch

        Q = angles.new_zeros(len(angles), self.size, self.size)
        row, column = torch.triu_indices(self.size, self.size, 1)
        Q[:, row, column] = angles
        Q = Q - Q.mT
        if self.largest is not None:
            bound = self.largest / math.sqrt(len(Q))
            sizes = torch.linalg.matrix_norm(Q)[:, None, None]
            Q = torch.where(sizes <= bound, Q, bound * Q / sizes)
        return _cayley(Q) if self.terms is None else _cayley_series(Q, self.terms)


@dataclass(frozen=True, kw_only=True)
class BoftModule(AdapterModule):
    """A module with BOFT."""

    blocks: TensorInfo
    scale: TensorInfo

    @property
    def kind(self) -> Kind:
        return "base"

    @property
    def called(self) -> str:
        return "BOFT"

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        raise self.no_factors()

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        self.check_fits(tuple(weight.shape))
        stored = read(self.blocks.name).double()
        turned = weight.double().T
        for level, data in enumerate(stored):
            order = _butterfly(level, *stored.shape[:3], device=str(stored.device))
            inner = turned.new_empty(turned.shape)
            inner[order] = turned
            rotated = _cayley((data - data.mT) / 2) @ inner.reshape(*data.shape[:2], -1)
            turned = rotated.reshape(turned.shape)[order]
        return turned.T * read(self.scale.name).double()


def _cayley(Q: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹ of skew Q (…, b, b), orthogonal."""
    import torch

    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


def _cayley_series(Q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + 2Q^(t−2) + Q^(t−1), as PEFT cuts the series: of 3 terms as of 4."""
    import torch

    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + (2 * Q if terms > 1 else 0 * Q)
    if terms > 2:
        power = Q @ Q
        R = R + 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            R = R + 2 * power
        R = R + power @ Q
    return R


def _butterfly(level: int, levels: int, count: int, size: int, *, device: str) -> Tensor:
    """Where the inputs of a level come from: in each group of 2^level blocks the half blocks at
    even places, then those at odd ones; without a butterfly every input stays."""
    import torch

    places = torch.arange(count * size, device=device)
    if levels == 1:
        return places
    halves = places.reshape(count >> level, 2 << level, size // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], 1).reshape(-1)


def oft_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, OftModule]:
    """Every adapted module by name. Raises CheckpointError for angles that make no blocks."""
    terms = config.get("num_cayley_neumann_terms", 5)
    modules: dict[str, OftModule] = {}
    for path, roles in by_module(tensors, _OFT, label).items():
        role, angles = next(iter(roles.items()))
        refuse_flat((angles,), label)
        blocks, entries = angles.shape
        size = (1 + math.isqrt(1 + 8 * entries)) // 2
        if size * (size - 1) // 2 != entries:
            raise CheckpointError(
                f"{label}: {angles.name} is {angles.shape}, and {entries} numbers are not those "
                "above the diagonal of a square; save the adapter again"
            )
        is_shared = bool(config.get("block_share"))
        modules[path] = OftModule(
            name=path,
            path=path,
            shape=(0, 0 if is_shared else blocks * size),
            rank=0,
            scaling=1.0,
            stored=(angles,),
            angles=angles,
            size=size,
            terms=terms if config.get("use_cayley_neumann", True) else None,
            largest=config.get("eps", 6e-5) if config.get("coft") else None,
            is_shared=is_shared,
            is_embedding=role == "oft_embedding_R",
        )
    return modules


def boft_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, BoftModule]:
    """Every adapted module by name. Raises CheckpointError for blocks that are not square."""
    found = by_module(tensors, _BOFT, label)
    refuse_partial(found, _BOFT, label)
    modules: dict[str, BoftModule] = {}
    for path, roles in found.items():
        blocks, scale = (roles[one] for one in _BOFT)
        if len(blocks.shape) != 4 or len(set(blocks.shape[2:])) != 1 or scale.shape[1:] != (1,):
            raise CheckpointError(
                f"{label}: {path} has boft_R {blocks.shape} and boft_s {scale.shape}, and needs "
                "(levels, blocks, b, b) and (out, 1); save the adapter again"
            )
        modules[path] = BoftModule(
            name=path,
            path=path,
            shape=(scale.shape[0], blocks.shape[1] * blocks.shape[2]),
            rank=0,
            scaling=1.0,
            stored=(blocks, scale),
            blocks=blocks,
            scale=scale,
        )
    return modules
