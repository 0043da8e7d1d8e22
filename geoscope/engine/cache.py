"""Results that were computed before: one small file a matrix, found by content.

The key holds everything the numbers depend on: the bytes of both tensors (or Hub commit and name),
the parameters, the device, and the code that computed them. A rerun after Ctrl-C continues where
it stopped, and a stale entry can never be found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope.files import keep

__all__ = ["ResultCache", "content_of"]


@dataclass(frozen=True)
class ResultCache:
    """A folder of results."""

    folder: Path

    def key(self, parts: Mapping[str, Any]) -> str:
        """The key of a result: sha256 over its parts and the code version."""
        text = json.dumps({**parts, "code": code_version()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The result, or None; a damaged file counts as none."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Keeps a result. A full or read-only disk is no reason to fail: it is then not kept."""
        keep(self._path(key), json.dumps(result, allow_nan=False).encode())

    def files(self) -> Iterator[Path]:
        """The file of every result."""
        yield from sorted(self.folder.glob("??/*.json"))

    def clear(self) -> int:
        """Removes everything; the number of results that were removed."""
        removed = 0
        for path in sorted(self.folder.glob("??/*")):  # what a killed run left, too
            path.unlink(missing_ok=True)
            removed += path.suffix == ".json"
        for folder in sorted(self.folder.glob("??")):
            folder.rmdir()
        return removed

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def content_of(weight: Tensor) -> str:
    """sha256 of a stored tensor: dtype, shape and bytes."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def code_version() -> str:
    """sha256 of the modules that make the numbers, and the version of torch."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in ("linalg", "metrics"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
