"""What is a base with an adapter over it? A checkpoint of which some tensors are changed when read.

The update of a low-rank adapter stays in its factors: they are at hand for what takes an update,
and a whole weight is made, in fp64, only where the tuned weight itself is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from geoscope.formats.views import Blocks
from geoscope.models.checkpoint import Checkpoint
from geoscope.names import NameMap
from geoscope.peft.adapter import Adapter
from geoscope.peft.module import AdapterModule
from geoscope.records import Quantisation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaptedCheckpoint", "Change"]

Factors = tuple["Tensor", "Tensor", float]


@dataclass(frozen=True)
class Change:
    """How one tensor of the base is changed.

    key: what `Adapter.updated` takes: a module, or a base tensor by its live name. module: None for
    a whole replacement, new rows, a bias. replaced: the stored tensor that takes the base's place.
    expert: of a stack. rows: the outputs of the adapted matrix that this tensor is; None for all.
    is_part: whether the adapter has the part itself as a module, and not the stored tensor.
    is_zero: whether the adapter leaves it as it is, beside another one that does not.
    """

    key: str
    module: AdapterModule | None = None
    replaced: str | None = None
    expert: int = 0
    rows: Blocks | None = None
    is_part: bool = False
    is_zero: bool = False

    @property
    def has_factors(self) -> bool:
        """Whether the update is a product by itself."""
        return self.module is not None and self.module.kind == "factors" and self.replaced is None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AdaptedCheckpoint(Checkpoint):
    """A base with an adapter over it.

    base: in the same parts as this one. whole: the base as it is stored. changes: name here → how.
    start: the adapter before training, where its product was not zero; it is taken off again, by
    start_changes. is_difference: whether the start is another adapter of the same model, so that a
    module that one of both has not is zero there. is_doubled: whether the layout has twice the rank
    that was asked for. names: the rules by which modules find their tensors.
    """

    base: Checkpoint
    whole: Checkpoint
    adapter: Adapter
    changes: Mapping[str, Change]
    start: Adapter | None = None
    start_changes: Mapping[str, Change] = field(default_factory=dict[str, Change])
    is_difference: bool = False
    is_doubled: bool = False
    names: NameMap = field(default_factory=NameMap)

    @property
    def is_adapted(self) -> bool:
        return True

    @property
    def module_names(self) -> tuple[str, ...]:
        return tuple(f"{module.path}.weight" for module in self.adapter.modules.values())

    def lies_over(self, base: Checkpoint) -> bool:
        return self.base is base

    def leaves(self, name: str) -> bool:
        return name not in self.changes

    def update(self, base: Checkpoint, name: str) -> tuple[Tensor, ...]:
        if self.parts_of_update(base, name) == 1:
            return super().update(base, name)
        import torch

        triples = (
            (B, A, torch.tensor([scaling], dtype=torch.float64))
            for B, A, scaling in self.factors(name)
        )
        return tuple(tensor for triple in triples for tensor in triple)

    def parts_of_update(self, base: Checkpoint, name: str) -> int:
        change = self.changes.get(name)
        if not self.lies_over(base) or change is None or not change.has_factors:
            return 1
        return 3 if self.start is None else 6

    def over_rows(
        self, before: Checkpoint, base: Checkpoint, rows: Mapping[str, Blocks]
    ) -> Checkpoint:
        if not self.lies_over(before):
            return self
        changes = {
            name: replace(change, rows=rows.get(name, change.rows))
            for name, change in self.changes.items()
        }
        return replace(self, base=base, changes=changes)

    def nominal_rank(self, name: str) -> int | None:
        change = self.changes.get(name)
        if change is None or change.module is None or not change.has_factors:
            return None
        return change.module.rank // 2 if self.is_doubled else change.module.rank

    def factors(self, name: str) -> tuple[Factors, ...]:
        """(B (m, r), A (r, n), scaling), as stored, with the update scaling·B·A; with a start two
        of these, of which the second is to be subtracted. Empty for a change that has none."""
        change = self.changes.get(name)
        if change is None or not change.has_factors:
            return ()
        factors = _factors(self.adapter, change)
        if self.start is None:
            return (factors,)
        return factors, _factors(self.start, self.start_changes[name])

    def read(self, name: str, *, buffer: Tensor | None = None) -> Tensor:
        """The tuned tensor: of one that is changed in fp64, else as the base has it."""
        change = self.changes.get(name)
        if change is None:
            return self.base.read(name, buffer=buffer)
        if not change.has_factors:
            view = None if change.is_part else self.base.views.get(name)
            if change.is_part:
                return _taken(self.adapter.updated(change.key, self.base.read(name)), change.rows)
            stored = name if view is None else view.stored
            tuned = self.adapter.updated(change.key, self.whole.read(stored))
            if view is not None and tuned.dim() == 3:  # one expert of a stack, as it is stored
                part = _taken(tuned[view.matrix], view.blocks, view.axis)
                return part.T if self.tensors[name].transposed else part
            return _taken(tuned, change.rows)
        tuned = self.base.read(name).double()
        for sign, (B, A, scaling) in zip((1, -1), self.factors(name), strict=False):
            tuned = tuned.addmm(B.double(), A.double(), alpha=sign * scaling)
        return tuned

    def read_part(self, name: str, begin: int, end: int) -> Tensor:
        """Entries in the order of the base's file; the whole tensor is read for it."""
        if name not in self.changes:
            return self.base.read_part(name, begin, end)
        tensor = self.read(name)
        stored = tensor.T if self.tensors[name].transposed else tensor
        return stored.reshape(-1)[begin:end]

    def rounding(self, name: str) -> Quantisation | None:
        return None if name in self.changes else self.base.rounding(name)


def _factors(adapter: Adapter, change: Change) -> Factors:
    assert change.module is not None
    if change.is_zero:
        return _zero(change, change.module.shape)
    B, A = adapter.factors(change.key)
    return _taken(B[change.expert], change.rows), A[change.expert], change.module.scaling


def _zero(change: Change, shape: tuple[int, int]) -> Factors:
    """Factors of rank 1 whose product is zero."""
    import torch

    m = shape[0] if change.rows is None else change.rows.total
    return (
        torch.zeros(m, 1, dtype=torch.float32, device="cpu"),
        torch.zeros(1, shape[1], dtype=torch.float32, device="cpu"),
        1.0,
    )


def _taken(matrix: Tensor, rows: Blocks | None, axis: int = 0) -> Tensor:
    """Some rows, or of axis 1 columns."""
    if rows is None:
        return matrix
    import torch

    starts = rows.start + rows.stride * torch.arange(rows.repeats)
    return matrix.index_select(axis, (starts[:, None] + torch.arange(rows.count)).reshape(-1))
