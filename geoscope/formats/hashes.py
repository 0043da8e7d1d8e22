"""SHA-256 of files, and of tensors as a file holds them: what geoscope.json knows them by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from geoscope.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["file_sha256", "tensor_sha256"]


def tensor_sha256(tensor: Tensor) -> str:
    """Of the bytes of a tensor on the CPU, in the order of its indices; hexadecimal."""
    import torch

    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    """Of a whole file, hexadecimal. Raises CheckpointError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
