"""How does a VeRA adapter of PEFT store its update? As two vectors around shared random matrices.

    <module>.vera_lambda_b (out,), <module>.vera_lambda_d (r,)
    base_model.vera_A (r, largest in), base_model.vera_B (largest out, r)

ΔW = diag(λ_b)·B·diag(λ_d)·A with the first `out` rows of B and `in` columns of A. The inner side of
a module is not stored: the base tells it. Without `save_projection` A and B are drawn again from
`projection_prng_key`, in fp32 and rounded to the dtype of the base, as PEFT draws them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, first_names
from geoscope.foreign import shown
from geoscope.names import without_wrappers
from geoscope.peft.keys import by_module, refuse_partial
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VeraModule", "vera_modules"]

_ROLES = ("vera_lambda_b", "vera_lambda_d")
_PROJECTION = r"base_model\.vera_{side}(?:\.[^.]+)?"
_SEEDS = 1 << 63  # that torch takes
_PRECISIONS = ("float16", "bfloat16")


@dataclass(frozen=True)
class _Drawn:
    """Projections that are drawn again: B (m, r), then A (r, n) of the largest sides."""

    seed: int
    rank: int
    m: int
    n: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class VeraModule(AdapterModule):
    """A module with VeRA; of kind "factors" once the base has told its inner side.

    A, B: the shared projections as stored, None where they are drawn. every: names of all modules,
    whose largest sides the projections have.
    """

    lambda_b: TensorInfo
    lambda_d: TensorInfo
    A: TensorInfo | None
    B: TensorInfo | None
    seed: int
    every: tuple[str, ...]
    drawn: _Drawn | None = None

    @property
    def kind(self) -> Kind:
        known = self.A is not None or self.drawn is not None
        return "factors" if known and self.shape[1] else "base"

    @property
    def called(self) -> str:
        return "VeRA"

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """λ_b ⊙ B and λ_d ⊙ A in fp64. Raises UnsupportedFormat without the base's shapes."""
        if self.kind == "base":
            raise self.unknown_sides()
        B, A = self._projections(read)
        m, n = self.shape
        scale_b, scale_d = (read(one.name).double() for one in (self.lambda_b, self.lambda_d))
        return (scale_b[:, None] * B[:m])[None], (scale_d[:, None] * A[:, :n])[None]

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        self.check_fits(tuple(weight.shape))
        m, n = weight.shape
        own = replace(self, shape=(m, n))
        own.check_inner()
        return super(VeraModule, own).updated(weight, read)

    def with_base(self, base: Mapping[str, TensorInfo]) -> VeraModule:
        """Its inner side, and where the projections are drawn their sizes and dtype.

        Raises CheckpointError for a base without one of the modules, where their sizes need it.
        """
        own = base.get(self.name)
        if own is None:
            return self
        self.check_fits(own.shape)
        m, n = own.shape
        known = replace(self, shape=(m, n), drawn=self.drawn or self._drawn(base))
        known.check_inner()
        return known

    def renamed(self, new: Callable[[str], str]) -> VeraModule:
        return replace(self, name=new(self.name), every=tuple(new(one) for one in self.every))

    def check_inner(self) -> None:
        """Raises CheckpointError where the projection is too small for the module."""
        if self.A is not None and self.shape[1] > self.A.shape[1]:
            raise CheckpointError(
                f"{self.name}: its weight is {self.shape} in the base, and {self.A.name} is "
                f"{self.A.shape}; give the model that the adapter was trained on"
            )

    def _drawn(self, base: Mapping[str, TensorInfo]) -> _Drawn | None:
        if self.A is not None:
            return None
        if lacking := [name for name in self.every if name not in base]:
            raise CheckpointError(
                f"{self.name}: VeRA's projections have the largest sides of all its modules, and "
                f"the base lacks {len(lacking)} modules: {first_names(lacking)}; give the model "
                "that the adapter was trained on"
            )
        shapes = [base[name].shape for name in self.every]
        largest = (max(m for m, _ in shapes), max(n for _, n in shapes))
        dtype = base[self.name].dtype
        return _Drawn(self.seed, self.rank, *largest, dtype if dtype in _PRECISIONS else "float32")

    def _projections(self, read: Read) -> tuple[Tensor, Tensor]:
        """B and A in fp64, of the largest sides."""
        if self.A is None or self.B is None:
            assert self.drawn is not None
            return _draw(self.drawn)
        return read(self.B.name).double(), read(self.A.name).double()


@lru_cache(maxsize=1)
def _draw(drawn: _Drawn) -> tuple[Tensor, Tensor]:
    """B and A in fp64: Kaiming-uniform, ±√(6/fan_in), A before B from one generator."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(drawn.seed)
    dtype = getattr(torch, drawn.dtype)

    def uniform(*shape: int) -> Tensor:
        # In the order of PEFT, so that the bound is the same number to the last bit.
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        made = torch.empty(shape, dtype=torch.float32, device="cpu")
        return made.uniform_(-bound, bound, generator=generator).to(dtype).double()

    A = uniform(drawn.rank, drawn.n)
    return uniform(drawn.m, drawn.rank), A


def vera_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, VeraModule]:
    """Every adapted module by name. Raises CheckpointError for vectors and projections that do not
    belong together."""
    found = by_module(tensors, _ROLES, label)
    refuse_partial(found, _ROLES, label)
    A, B = (_projection(side, tensors) for side in "AB")
    rank, seed = config.get("r"), config.get("projection_prng_key", 0)
    if (A is None) is not (B is None) or (A is None and config.get("save_projection")):
        side = "vera_A" if A is None else "vera_B"
        raise CheckpointError(f"{label}: lacks {side}, the shared projection; copy the file again")
    if type(rank) is not int or type(seed) is not int or not 0 <= seed < _SEEDS:
        raise CheckpointError(
            f"{label}: r is {shown(rank)} and projection_prng_key {shown(seed)} in "
            "adapter_config.json, and must be whole numbers; copy adapter_config.json again"
        )
    every = tuple(found)
    modules: dict[str, VeraModule] = {}
    for path, roles in found.items():
        b, d = (roles[one] for one in _ROLES)
        outer = B.shape[0] if B is not None else math.inf
        ranks = {d.shape, *(() if A is None or B is None else (A.shape[:1], B.shape[1:]))}
        if len(b.shape) != 1 or not 0 < b.shape[0] <= outer or ranks != {(rank,)}:
            shared = "" if A is None or B is None else f", vera_A {A.shape}, vera_B {B.shape}"
            raise CheckpointError(
                f"{label}: {path} has vera_lambda_b {b.shape}, vera_lambda_d {d.shape}{shared}, "
                f"the config rank {rank}; factors and adapter_config.json are of different saves: "
                "copy both again"
            )
        modules[path] = VeraModule(
            name=path,
            path=path,
            shape=(b.shape[0], 0),
            rank=rank,
            scaling=1.0,
            stored=(b, d) if A is None or B is None else (b, d, A, B),
            lambda_b=b,
            lambda_d=d,
            A=A,
            B=B,
            seed=seed,
            every=every,
        )
    return modules


def _projection(side: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    pattern = re.compile(_PROJECTION.format(side=side))
    every = ((without_wrappers(name), info) for name, info in tensors.items())
    return next((info for name, info in every if pattern.fullmatch(name)), None)
