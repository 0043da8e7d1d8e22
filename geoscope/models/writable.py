"""Can a model be written, or only be compared?"""

from __future__ import annotations

from geoscope.errors import UnsupportedFormat
from geoscope.formats.refused import GIVE_BF16
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.ungathered import refuse_ungathered

__all__ = ["refuse_unwritable"]


def refuse_unwritable(checkpoint: Checkpoint, command: str) -> None:
    """Raises CheckpointError for what can be compared, and not be written: codes, empty tensors,
    stacks of Megatron.

    command: as the message names it.
    """
    refuse_ungathered(checkpoint)
    if checkpoint.views:  # before anything is taken apart: Megatron's stacks
        raise UnsupportedFormat(
            f"`{checkpoint.ref.given}`: Megatron's shards. {command} needs the files of a model. "
            "Convert it to the format of transformers and give that"
        )
    weight = next(iter(checkpoint.quantised.values()), None)
    if weight is not None:
        raise UnsupportedFormat(
            f"`{checkpoint.ref.given}`: weights are {weight.kind.name} "
            f"(tensor {weight.scale.name}). {command} needs fp32, fp16 or bf16. {GIVE_BF16}"
        )
