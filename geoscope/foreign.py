"""What others wrote: small files, JSON and paths. Here they are opened, decoded and checked.

A small file is a regular file within a limit of bytes; a pipe or a device is never opened. JSON of
any depth and with numbers of any length becomes a value or one line that says why not.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError

__all__ = [
    "COUNT",
    "COUNTS",
    "FLAG",
    "INDEX",
    "NUMBER",
    "SMALL",
    "TABLE",
    "TEXT",
    "TEXTS",
    "Form",
    "check_fields",
    "either",
    "exists",
    "is_folder",
    "local_path",
    "parsed",
    "printable",
    "reason",
    "resolved",
    "shown",
    "small_bytes",
    "small_text",
]

# Bytes of a configuration, a record or an entry of a cache; of an index, a log or a report.
SMALL = 64 << 20
INDEX = 512 << 20

# Longer whole numbers are read as floats; a sum of others fits into a float.
_DIGITS = 300


# --- files ----------------------------------------------------------------------------------------


def small_bytes(path: Path, limit: int = SMALL) -> bytes:
    """The content of a regular file. Raises OSError: absent, unreadable, no file, too large."""
    try:
        _check_regular(path.stat())  # before it is opened: a pipe would wait, a device may act
        with path.open("rb") as file:
            _check_regular(os.fstat(file.fileno()))
            raw = file.read(limit + 1)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error)) from None
    if len(raw) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes, the most that are read")
    return raw


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, and a regular file is needed")


def small_text(path: Path, limit: int = SMALL, *, encoding: str = "utf-8") -> str:
    """The same as text. Raises OSError for bytes that are none, too."""
    try:
        return small_bytes(path, limit).decode(encoding)
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"it is not text: {error}") from None


def reason(error: OSError) -> str:
    """Why a file could not be used, without its name."""
    return error.strerror or str(error)


# --- paths ----------------------------------------------------------------------------------------


def local_path(text: str | os.PathLike[str]) -> Path:
    """The path with ~ for the user's folder; a name that is not a user's stays as it is."""
    path = Path(text)
    try:
        return path.expanduser()
    except (RuntimeError, ValueError):
        return path


def resolved(path: Path) -> Path:
    """The path without links; one that leads in a circle, or is not a name of a file, stays."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()


def is_folder(path: Path) -> bool:
    """Whether a folder is there; no path is too long or too odd to be asked for."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def exists(path: Path) -> bool:
    """Whether something is there, likewise."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


# --- text ---------------------------------------------------------------------------------------

# What steers a terminal or turns the line around: controls, line separators, marks of direction,
# and halves of letters, which no UTF-8 can hold.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def printable(text: str, *, lines: bool = False) -> str:
    """The text with each such letter as its escape; lines: line ends and tabs stay.

    >>> printable("a\x1b[31mb")
    'a\\\\x1b[31mb'
    """

    def escape(match: re.Match[str]) -> str:
        letter = match[0]
        return letter if lines and letter in "\n\t" else ascii(letter)[1:-1]

    return _UNSEEN.sub(escape, text)


# --- JSON -----------------------------------------------------------------------------------------


def parsed(text: str | bytes, **hooks: Any) -> Any:
    """The value of a JSON document. Raises ValueError, one line; hooks: as of `json.loads`."""
    try:
        return json.loads(text, **{"parse_int": _whole, **hooks})
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(_other_than_json(text[:64]) or str(error)) from None


def _other_than_json(begin: str | bytes) -> str | None:
    """What a file is that has no JSON, where its first letters tell."""
    text = begin if isinstance(begin, str) else begin.decode("latin-1")
    if text.startswith("version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull` in its folder"
    if text.lstrip().startswith("<"):
        return "it is a web page"
    if "\0" in text or text.startswith(("PK\x03\x04", "GGUF")):
        return "it is a binary file"
    return None if text.strip() else "it is empty"


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


class _Spelling(reprlib.Repr):
    """Python's, with the words of JSON for what JSON has words for."""

    def repr_bool(self, value: bool, _level: int) -> str:
        return json.dumps(value)

    def repr_NoneType(self, _value: None, _level: int) -> str:
        return "null"


_REPR = _Spelling()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def shown(value: Any) -> str:
    """A value of a foreign document for a message, cut where it is long."""
    return _REPR.repr(value)


@dataclass(frozen=True)
class Form:
    """What a field may hold; None, which stands for an absent field, always passes."""

    words: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


TEXT = Form("a text", _is_text)
TEXTS = Form("a list of texts", _is_list_of(_is_text))
FLAG = Form("true or false", lambda value: isinstance(value, bool))
NUMBER = Form("a number", _is_number)
COUNT = Form("a whole number", _is_whole)
COUNTS = Form("whole numbers", lambda value: _is_whole(value) or _is_list_of(_is_whole)(value))
TABLE = Form("a table", lambda value: isinstance(value, dict))


def either(*forms: Form) -> Form:
    """A field that may hold any of these."""
    words = " or ".join(form.words for form in forms)
    return Form(words, lambda value: any(form.holds(value) for form in forms))


def check_fields(
    table: Mapping[str, Any],
    forms: Mapping[str, Form],
    label: str,
    *,
    advice: str = "copy the file again",
) -> None:
    """Raises CheckpointError for the first field of a document, called `label`, of another form."""
    for field, form in forms.items():
        value = table.get(field)
        if value is not None and not form.holds(value):
            raise CheckpointError(
                f"{label}: {field} is {shown(value)}, and must be {form.words}; {advice}"
            )
