"""How does a MiSS adapter of PEFT store its update? As a block that all parts of the input share.

<module>.miss_block (r, out)         ΔW[:, j] = block[j mod r]
<module>.miss_block (r, mini_r)      `init_weights: mini`: the same block for each mini_r outputs
<module>.miss_block (out/r, r, r)    `init_weights: bat`: W_ij + W_ij·block_i + block_i

The first two are products: ΔW = blockᵀ·[I I I …], of rank r. The inner side of a module is not
stored: the base tells it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError
from geoscope.peft.keys import by_module
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MissModule", "miss_modules"]


@dataclass(frozen=True, kw_only=True)
class MissModule(AdapterModule):
    """A module with MiSS; of kind "factors" once the base has told its sides, unless it is "bat".

    block: as stored. is_bat: whether it multiplies the base.
    """

    block: TensorInfo
    is_bat: bool = False

    @property
    def kind(self) -> Kind:
        return "base" if self.is_bat or 0 in self.shape else "factors"

    @property
    def called(self) -> str:
        return "MiSS (bat)" if self.is_bat else "MiSS"

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """blockᵀ as stored, and ones where j mod r = i, in fp64."""
        import torch

        if self.is_bat:
            raise self.no_factors()
        if 0 in self.shape:
            raise self.unknown_sides()
        m, n = self.shape
        B = read(self.block.name).T
        if m % len(B):
            raise CheckpointError(
                f"{self.name}: {self.block.name} is {self.block.shape}, which does not divide the "
                f"{m} outputs of the base; give the model that the adapter was trained on"
            )
        A = torch.zeros(self.rank, n, dtype=torch.float64)
        A[torch.arange(n) % self.rank, torch.arange(n)] = 1
        return B.repeat(m // len(B), 1)[None], A[None]

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        self.check_fits(tuple(weight.shape))
        m, n = weight.shape
        if not self.is_bat:
            return super(MissModule, replace(self, shape=(m, n))).updated(weight, read)
        block, r = read(self.block.name).double(), self.block.shape[-1]
        if n % r:
            raise CheckpointError(
                f"{self.name}: its {n} inputs in the base are not cut into blocks of {r}; give the "
                "model that the adapter was trained on"
            )
        W = weight.double().reshape(m // r, r, n // r, r).permute(2, 0, 1, 3)
        return (W + W @ block + block).permute(1, 2, 0, 3).reshape(m, n)


def miss_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, MissModule]:
    """Every adapted module by name. Raises CheckpointError for what contradicts the config."""
    kind = config.get("init_weights", True)
    is_bat = kind == "bat"
    modules: dict[str, MissModule] = {}
    for path, roles in by_module(tensors, ("miss_block",), label).items():
        block = roles["miss_block"]
        rank = block.shape[-1 if is_bat else 0] if block.shape else 0
        wanted = (block.shape[0], rank, rank) if is_bat else (rank, block.shape[-1])
        if rank == 0 or block.shape != wanted or rank != config.get("r"):
            raise CheckpointError(
                f"{label}: {block.name} is {block.shape}, and adapter_config.json has r "
                f"{config.get('r')!r} and init_weights {kind!r}; they are of different saves, or "
                "the shards were not gathered: copy both again"
            )
        outer = block.shape[0] * rank if is_bat else block.shape[1]
        modules[path] = MissModule(
            name=path,
            path=path,
            shape=(0 if kind == "mini" else outer, 0),
            rank=0 if is_bat else rank,
            scaling=1.0,
            stored=(block,),
            block=block,
            is_bat=is_bat,
        )
    return modules
