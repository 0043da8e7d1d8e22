"""Can a model be written, or only be compared?"""

from __future__ import annotations

from geoscope.errors import UnsupportedFormat
from geoscope.formats.block_fp8 import SCALE
from geoscope.formats.refused import GIVE_BF16
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.ungathered import refuse_ungathered

__all__ = ["refuse_unwritable"]


def refuse_unwritable(checkpoint: Checkpoint, command: str) -> None:
    """Raises CheckpointError for what can be compared, and not be written: FP8, empty tensors.

    command: as the message names it.
    """
    refuse_ungathered(checkpoint)
    if checkpoint.scales:
        scale = f"tensor {next(iter(checkpoint.scales))}{SCALE}"
        raise UnsupportedFormat(
            f"`{checkpoint.ref.given}`: weights are block-scaled FP8 ({scale}). {command} needs "
            f"fp32, fp16 or bf16. {GIVE_BF16}"
        )
