"""What does the layer above see of one adapted weight, whatever the type of the adapter?

A shape, a kind, and the tensors that it is stored in. Where the update is low rank by itself its
kind is "factors", update = scaling · B·A; where it exists on a base weight alone (DoRA, IA3) it is
"base". Each type of PEFT has a subclass in a file of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.peft.extras import Read, Vector
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterModule", "Kind", "Read"]

Kind = Literal["factors", "base"]


@dataclass(frozen=True, kw_only=True)
class AdapterModule(ABC):
    """One adapted module.

    name: path of the module in the live model, `model.layers.0.self_attn.q_proj`; of stacked
    experts the path of the parameter, `model.layers.0.mlp.experts.gate_up_proj`. path: the same
    as it stands in the keys. shape: of the weight (or of each expert's) as a base is read:
    (out, in), of an embedding (vocab, dim); a side that the adapter does not tell is 0. rank: of
    B·A, 0 where there is none. alpha: None where the type has none. stored: the tensors that the
    update is made of. experts: how many matrices they hold, 1 but for stacks. is_turned: of a
    stack, whether the stored factors are those of ΔWᵀ; None where nothing has told it yet, and
    `shape` is then as stored.
    """

    name: str
    path: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    stored: tuple[TensorInfo, ...]
    alpha: float | None = None
    experts: int = 1
    is_stack: bool = False
    is_turned: bool | None = False

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """ "factors" where update = scaling · B·A, "base" where it needs the base weight."""

    @property
    @abstractmethod
    def called(self) -> str:
        """How messages call its way of changing a weight: "LoRA", "DoRA"."""

    @abstractmethod
    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """B (E, m, r) and A (E, r, n), update = scaling · B·A. Storage dtypes, or fp64 where a
        stored diagonal is multiplied in. Raises UnsupportedFormat for kind "base"."""

    @property
    def vectors(self) -> Mapping[str, Vector]:
        """Base tensor → its change, of the vectors that belong to the module: its bias."""
        return {}

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        """W′ in fp64 from the base weight W, (m, n) or (E, m, n). Raises CheckpointError for
        another shape."""
        self.check_fits(tuple(weight.shape))
        B, A = (factor.double() for factor in self.factors(read))
        return weight.double() + self.scaling * (B @ A).reshape(weight.shape)

    def with_base(self, base: Mapping[str, TensorInfo]) -> AdapterModule:
        """The same with what only the base tells: a side that the adapter does not store.

        base: name of a module → its weight there. Raises CheckpointError for another shape.
        """
        own = base.get(self.name)
        if own is None or 0 not in self.shape:
            return self
        self.check_fits(own.shape)
        m, n = own.shape[-2:]
        return replace(self, shape=(m, n))

    def renamed(self, new: Callable[[str], str]) -> AdapterModule:
        """The same under the name that `new` gives it; `path` stays."""
        return replace(self, name=new(self.name))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a base weight of that shape, (m, n) or (E, m, n), can be the adapted one."""
        if len(shape) < 2:
            return False
        sides = zip(self.shape, shape[-2:], strict=True)
        above = ((), (1,)) if self.experts == 1 else ((self.experts,),)
        return shape[:-2] in above and all(own in (0, given) for own, given in sides)

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError where a base weight of that shape cannot be the adapted one."""
        if not self.fits(shape):
            whole = (self.experts, *self.shape) if self.is_stack else self.shape
            sides = ", ".join(str(side or "any") for side in whole)
            raise CheckpointError(
                f"{self.name}: the base weight is {shape}, the adapted one ({sides}); "
                "give the model that the adapter was trained on"
            )

    def unknown_sides(self) -> UnsupportedFormat:
        """The error of `factors` where the adapter does not store the sides of its modules."""
        return UnsupportedFormat(
            f"{self.name}: {self.called} does not store the sizes of its modules; give the base "
            "with `base`"
        )

    def no_factors(self) -> UnsupportedFormat:
        """The error of `factors` for kind "base"."""
        return UnsupportedFormat(
            f"{self.name}: the change by {self.called} is not a product of two factors; "
            "give the base weights with `base`"
        )
