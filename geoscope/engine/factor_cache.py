"""Factors of single matrices that were computed before: found by content, bounded in size.

A base is compared with many tuned models, and its part of the work is always the same: singular
values and leading vectors. An entry is one file: the checksum over key and content, a line of
JSON that says what follows, and fp64 numbers. The oldest entries in use go first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope.engine.cache import content_key
from geoscope.files import TEMPORARY, keep, own_entries, remove, remove_if_empty
from geoscope.folders import kept_at_most
from geoscope.foreign import parsed, small_bytes
from geoscope.linalg import Factors

__all__ = ["FactorCache"]

_FOLDER = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.factors")
_LEFT = re.compile(rf"\.[0-9a-f]{{64}}\.factors\..*{re.escape(TEMPORARY)}")
_LARGEST = 2 << 30  # bytes of an entry
_DIGEST = 64
# After a round the kept entries are so much of the bound, so that not every entry makes a round.
_LEFT_OVER = 0.9


@dataclass(frozen=True)
class FactorCache:
    """A folder of factors.

    limit: bytes that all entries have at most; by default a share of the disk, see
    `kept_at_most`.
    """

    folder: Path
    limit: int | None = None

    def get(self, parts: Mapping[str, Any]) -> Factors | None:
        """The factors of one matrix, or None; what is not as `put` wrote it counts as none."""
        key = content_key(parts)
        path = self._path(key)
        try:
            raw = small_bytes(path, _LARGEST)
            if hashlib.sha256(key.encode() + raw[_DIGEST:]).hexdigest().encode() != raw[:_DIGEST]:
                return None
            factors = _read(memoryview(raw)[_DIGEST:])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        with suppress(OSError):
            os.utime(path)  # so that it counts as new
        return factors

    def put(self, parts: Mapping[str, Any], factors: Factors) -> None:
        """Keeps the factors of one matrix, where there is room on the disk."""
        key, content = content_key(parts), _written(factors)
        digest = hashlib.sha256(key.encode() + content).hexdigest().encode()
        keep(self._path(key), digest + content)
        self._bound(_DIGEST + len(content))

    def files(self) -> list[Path]:
        """The file of every entry, no link among them."""
        folders = own_entries(self.folder, _FOLDER, folders=True)
        return [path for folder in folders for path in own_entries(folder, _ENTRY)]

    def clear(self) -> int:
        """Removes all that is named as this cache names it; the number of entries removed."""
        removed = 0
        for folder in own_entries(self.folder, _FOLDER, folders=True):
            removed += remove(own_entries(folder, _ENTRY))
            remove(own_entries(folder, _LEFT))  # by a run that was killed
            remove_if_empty(folder)
        remove_if_empty(self.folder)
        return removed

    def _bound(self, added: int) -> None:
        """Lets the oldest entries go where all together are above the limit."""
        state = _state(self.folder)
        with state.lock:
            if state.kept is None:
                state.kept = sum(size for _, size, _ in self._ages())
                state.most = kept_at_most(self.folder, state.kept)
            else:
                state.kept += added
            most = state.most if self.limit is None else self.limit
            if state.kept <= most:
                return
            entries = sorted(self._ages())
            state.kept = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if state.kept <= _LEFT_OVER * most:
                    break
                state.kept -= size * remove([path])

    def _ages(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self.files():
            with suppress(OSError):  # another process may have removed it
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.factors"


@dataclass
class _State:
    """What this process knows of the folder: bytes kept, and how many may be."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    kept: int | None = None
    most: int = 0


@lru_cache(maxsize=64)
def _state(_folder: Path) -> _State:
    return _State()


def _written(factors: Factors) -> bytes:
    """Vectors go as rows, as they lie in memory."""
    U = None if factors.U is None else factors.U.mT
    tensors = {"S": factors.S, "U": U, "Vh": factors.Vh}
    shapes = {name: None if each is None else list(each.shape) for name, each in tensors.items()}
    head = json.dumps({"shapes": shapes, "methods": factors.methods}, allow_nan=False).encode()
    parts = [each.contiguous().numpy().tobytes() for each in tensors.values() if each is not None]
    return b"\n".join([head, b"".join(parts)])


def _read(raw: memoryview) -> Factors:
    """What `_written` wrote. Raises ValueError, TypeError or KeyError for anything else."""
    end = bytes(raw[:_HEAD]).index(b"\n")
    head = parsed(bytes(raw[:end]).decode())
    place, tensors = end + 1, dict[str, Tensor | None]()
    for name, shape in head["shapes"].items():
        tensors[name] = None
        if shape is not None:
            count = 8 * torch.Size(shape).numel()
            numbers = bytearray(raw[place : place + count])
            tensors[name] = torch.frombuffer(numbers, dtype=torch.float64).reshape(shape)
            place += count
    U, S = tensors["U"], tensors["S"]
    if S is None:
        raise ValueError("an entry without values")
    left = None if U is None else U.mT
    return Factors(S, left, tensors["Vh"], tuple(head["methods"]))


_HEAD = 1 << 16  # bytes in which the first line ends
