"""What opening and reading a checkpoint must give: the bits, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geoscope.errors import CheckpointError
from geoscope.models.checkpoint import Checkpoint
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import assert_equal_bits

__all__ = ["assert_reads", "refusal"]


def refusal(path: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_reads(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Whole, into a buffer, and in every kind of part: the bits of `tensors`."""
    assert set(checkpoint.tensors) == set(tensors)
    buffer = torch.full((4096,), 0xAB, dtype=torch.uint8)
    for name, expected in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(expected.shape)
        assert_equal_bits(checkpoint.read(name), expected)
        into = checkpoint.read(name, buffer=buffer)
        assert into.data_ptr() == buffer.data_ptr()
        assert_equal_bits(into, expected)
        flat, entries = expected.reshape(-1), expected.numel()
        for begin, end in (
            (0, entries),
            (1, entries - 1),
            (entries // 2, entries // 2 + 3),
            (2, 2),
        ):
            if 0 <= begin <= end <= entries:
                assert_equal_bits(checkpoint.read_part(name, begin, end), flat[begin:end])
