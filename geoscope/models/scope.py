"""Is a tensor a matrix to compare, a vector to compare, or left out, and why?

Default scope: floating-point matrices inside a numbered block, whatever the family, with at least
two rows and columns. A checkpoint without numbered blocks: every matrix but embeddings and output
head. `--include` reaches further; buffers and what is not a matrix stay out of its reach.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from geoscope.names import Selection, is_embedding, is_output_head, layer_index
from geoscope.records import CODES, Skipped, TensorInfo

__all__ = ["MATRIX", "VECTOR", "Scope"]

MATRIX = "matrix"
VECTOR = "vector"

_READ = frozenset({"float64", "float32", "float16", "bfloat16", *CODES})
# Floating-point tensors that are computed from the configuration and not trained.
_BUFFER = re.compile(
    r"(?:^|\.)(?:inv_freq|original_inv_freq|masked_bias|cos_cached|sin_cached"
    r"|running_mean|running_var)$"
)
_CONVOLUTION = re.compile(r"(?:^|[._])conv", re.IGNORECASE)
_REACH = "outside the default scope; `include` reaches it"


@dataclass(frozen=True)
class Scope:
    """The user's selection, on checkpoints with or without numbered blocks."""

    selection: Selection
    has_blocks: bool

    @classmethod
    def of(cls, selection: Selection, tensors: Iterable[TensorInfo]) -> Scope:
        has_blocks = any(
            len(info.shape) == 2 and layer_index(info.name) is not None for info in tensors
        )
        return cls(selection, has_blocks)

    def place_pair(self, base: TensorInfo, tuned: TensorInfo) -> str | Skipped:
        """MATRIX, VECTOR, or why the pair is left out; both have one shape."""
        if (base.dtype in _READ) != (tuned.dtype in _READ):
            readable = base if base.dtype in _READ else tuned
            reason = f"{base.dtype} in base, {tuned.dtype} in tuned"
            return Skipped(base.name, reason, self.wants_matrix(readable))
        return self.place(base)

    def place(self, info: TensorInfo) -> str | Skipped:
        """MATRIX, VECTOR, or why the tensor is left out."""
        name = info.name
        reason = _never(info)
        if reason is not None:
            return Skipped(name, reason)
        outside = None if len(info.shape) == 1 else self._outside(name)
        reason = self.selection.reason_against(
            name, in_default_scope=outside is None, scope_reason=outside or ""
        )
        if reason is not None:
            return Skipped(name, reason)
        if len(info.shape) == 3:
            reason = f"3-D {info.shape}: a stack of experts of unknown layout"
            return Skipped(name, reason, missing=True)
        return VECTOR if len(info.shape) == 1 else MATRIX

    def wants_matrix(self, info: TensorInfo) -> bool:
        """Whether the tensor is a weight matrix, or a stack of them, in scope."""
        place = self.place(info)
        return place == MATRIX or (isinstance(place, Skipped) and place.missing)

    def _outside(self, name: str) -> str | None:
        if is_output_head(name):
            return f"output head: {_REACH}"
        if is_embedding(name):
            return f"embedding: {_REACH}"
        if self.has_blocks and layer_index(name) is None:
            return f"not in a numbered block: {_REACH}"
        return None


def _never(info: TensorInfo) -> str | None:
    """Why no option brings the tensor in, or None."""
    shape = info.shape
    if info.dtype not in _READ or _BUFFER.search(info.name):
        return f"buffer ({info.dtype})"
    if len(shape) == 0:
        return "0-D: a single number"
    if 0 in shape:
        return f"empty {shape}"
    if len(shape) == 2 and min(shape) < 2:
        return "1 row or column"
    if len(shape) == 3 and not _is_stack(info):
        return f"3-D {shape}: no matrix"
    if len(shape) > 3:
        return f"{len(shape)}-D {shape}: no matrix"
    return None


def _is_stack(info: TensorInfo) -> bool:
    """Whether a 3-D tensor is a stack of matrices, one for each expert."""
    inside = layer_index(info.name) is not None and not _CONVOLUTION.search(info.name)
    return inside and min(info.shape[1:]) >= 2
