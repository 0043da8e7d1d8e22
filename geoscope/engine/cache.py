"""Results that were computed before: one small file a matrix, found by content.

The key holds everything the numbers depend on: the bytes of both tensors (or Hub commit and name),
the parameters, the device, and the code that computed them. A rerun after Ctrl-C continues where
it stopped, and a stale entry can never be found. An entry carries a checksum over key and result:
one that was changed, moved or cut is not there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from geoscope.files import TEMPORARY, keep, own_entries, remove, remove_if_empty
from geoscope.foreign import SMALL, parsed, small_text

__all__ = [
    "Recalled",
    "ResultCache",
    "code_version",
    "content_key",
    "content_of",
    "packed",
    "recalled_or_made",
    "unpacked",
]

Result = TypeVar("Result")


_FOLDER = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.json")
_LEFT = re.compile(rf"\.[0-9a-f]{{64}}\.json\..*{re.escape(TEMPORARY)}")


@dataclass(frozen=True)
class ResultCache:
    """A folder of results."""

    folder: Path

    def key(self, parts: Mapping[str, Any]) -> str:
        """The key of a result: sha256 over its parts and the code version."""
        return content_key(parts)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result, or None; whatever is not what `put` wrote under this key counts as none."""
        try:
            entry = parsed(small_text(self._path(key)))
            result = entry["result"]
            intact = entry["sha256"] == _checksum(key, result)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return result if intact and isinstance(result, dict) else None

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Keeps a result. A full or read-only disk is not a reason to fail: it is then not kept.

        Nor is a result larger than what is read back, or with a number that JSON does not hold.
        """
        try:
            entry = {"result": result, "sha256": _checksum(key, result)}
        except ValueError:
            return
        content = json.dumps(entry, allow_nan=False).encode()
        if len(content) <= SMALL:
            keep(self._path(key), content)

    def files(self) -> Iterator[Path]:
        """The file of every result, no link among them."""
        for folder in own_entries(self.folder, _FOLDER, folders=True):
            yield from own_entries(folder, _ENTRY)

    def clear(self) -> int:
        """Removes all that is named as the cache names it; the number of results removed."""
        removed = 0
        for folder in own_entries(self.folder, _FOLDER, folders=True):
            left = own_entries(folder, _LEFT)  # by a run that was killed
            removed += remove(own_entries(folder, _ENTRY))
            remove(left)
            remove_if_empty(folder)
        return removed

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


class Recalled(NamedTuple, Generic[Result]):
    """A result.

    key: under which the cache holds it, None where it does not.
    is_recalled: whether it came from there.
    """

    result: Result
    key: str | None
    is_recalled: bool


def recalled_or_made(
    cache: ResultCache | None,
    facts: Callable[[], Mapping[str, Any]],
    make: Callable[[], Result],
    entry_of: Callable[[Result], Mapping[str, Any]],
    result_of: Callable[[Any], Result | None],
) -> Recalled[Result]:
    """What the cache holds under the facts, or what is made, which it then keeps.

    facts: all that the result hangs on, asked for where there is a cache alone.
    result_of: of an entry; None for anything but what `entry_of` gave.
    """
    if cache is None:
        return Recalled(make(), None, False)
    key = cache.key(facts())
    found = result_of(cache.get(key))
    if found is not None:
        return Recalled(found, key, True)
    made = make()
    cache.put(key, entry_of(made))
    return Recalled(made, key, False)


def content_key(parts: Mapping[str, Any]) -> str:
    """sha256 over parts of JSON and the code version."""
    text = json.dumps({**parts, "code": code_version()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(key: str, result: Any) -> str:
    text = json.dumps(result, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{key} {text}".encode()).hexdigest()


def content_of(weight: Tensor) -> str:
    """sha256 of a stored tensor: dtype, shape and bytes."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def packed(tensor: Tensor | None) -> dict[str, Any] | None:
    """A tensor as JSON holds it, to the last bit."""
    if tensor is None:
        return None
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(raw).decode()}


def unpacked(entry: Any) -> Any:
    """The tensor of what `packed` gave. Raises AttributeError, KeyError, TypeError, ValueError."""
    if entry is None:
        return None
    raw = bytearray(base64.b64decode(entry["data"], validate=True))
    dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


@lru_cache(maxsize=1)
def code_version() -> str:
    """sha256 of the modules that make the numbers, and the version of torch."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in ("linalg", "metrics", "trajectory", "adapters", "verbs/series", "verbs/adapters"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
