"""Tensors of size 0, the mark of a ZeRO-3 (or FSDP) save that was not gathered.

Under ZeRO-3 every rank holds a part of each large parameter, and the module itself an empty tensor
of shape (0,). A save that does not gather them writes these; small parameters stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from geoscope.errors import CheckpointError, first_names
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from geoscope.models.checkpoint import Checkpoint

__all__ = ["empty_reason", "is_ungathered", "refuse_ungathered", "ungathered"]

_WAY_OUT = (
    "a ZeRO-3 save that was not gathered; save with stage3_gather_16bit_weights_on_model_save, or "
    "run zero_to_fp32.py on the DeepSpeed checkpoint"
)


def is_ungathered(info: TensorInfo) -> bool:
    """Whether a weight is empty as ZeRO-3 leaves it."""
    return info.shape == (0,) and info.dtype.startswith(("float", "bfloat"))


def ungathered(tensors: Mapping[str, TensorInfo]) -> str | None:
    """One line on the empty tensors of a model, None without any."""
    empty = [name for name, info in tensors.items() if is_ungathered(info)]
    if not empty:
        return None
    return f"{len(empty)} of {len(tensors)} tensors are empty ({first_names(empty, 1)}): {_WAY_OUT}"


def empty_reason(base: TensorInfo, tuned: TensorInfo) -> str | None:
    """Why a pair with an empty side is not compared; None where neither is."""
    sides = [side for side, info in (("base", base), ("tuned", tuned)) if is_ungathered(info)]
    return f"empty in {' and '.join(sides)}: {_WAY_OUT}" if sides else None


def refuse_ungathered(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a model with empty tensors, where a whole one is needed."""
    line = ungathered(checkpoint.tensors)
    if line is not None:
        raise CheckpointError(f"`{checkpoint.ref.given}`: {line}")
