"""Inputs that are wrong in one known way, by name: some hundred, each with what a user is told.

A `Case` changes one thing of a door's valid inputs and runs one command on it. `expected.tsv`
holds the exit code of each and its line: of an error that line, else the headline, and the first
note. Folders are named from the folder of the inputs, in which the commands run.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bad.doors import DOORS, LONG, ODD, PACKED
from tests.helpers.running import Done

__all__ = ["Case", "cases", "line_of", "restored"]

Edit = Callable[[Path], None]
_LABELS = {text: label for label, text in LONG.items()}
_DEPTH = 4  # of a document, down to which values are changed
_NAME = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Case:
    """edit: what is done to the door's target. command: words, and one more behind a NUL."""

    name: str
    edit: Edit
    command: str


def line_of(done: Done, root: Path) -> str:
    """What a user reads first: the last line of an error; else the headline and the first note."""
    err = re.sub(r"\n  +", " ", done.err).replace(str(root), "{}")
    # where a file is cut hangs on the length of the paths in it
    err = re.sub(r"line \d+ column \d+ \(char \d+\)", "line N column N (char N)", err)
    if done.code and err:
        return err.splitlines()[-1]
    _, _, rest = done.out.replace(str(root), "{}").partition("\n\n")
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    return " | ".join([re.sub(r"\s+", " ", rest.partition("\n")[0]), *notes[:1]])


def restored(target: Path, valid: bytes) -> None:
    """The target as it was, whatever stands there."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.write_bytes(valid)


# --- JSON, one value at a time ------------------------------------------------------------------

Spot = tuple[str | int, ...]


def _spots(value: Any, spot: Spot = ()) -> Iterator[Spot]:
    """Every place of a document below its top."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*spot, key)
        if isinstance(inner, (dict, list)):
            yield from _spots(inner, (*spot, key))


def _with(text: str, spot: Spot, odd: str | None) -> str:
    """The document with this value there, as JSON spells it; None: without the key."""
    document = json.loads(text)
    place = document
    for key in spot[:-1]:
        place = place[key]
    if odd is None:
        del place[spot[-1]]
    else:
        place[spot[-1]] = "@here@"
    return json.dumps(document).replace('"@here@"', odd or "")


def _text_of(target: Path) -> tuple[str, bytes | None]:
    """The JSON of a file; of safetensors its header, and the bytes behind it."""
    if target.suffix != ".safetensors":
        return target.read_text(), None
    raw = target.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length].decode(), raw[8 + length :]


def _set(spot: Spot, odd: str | None) -> Edit:
    def edit(target: Path) -> None:
        text, behind = _text_of(target)
        changed = _with(text, spot, odd).encode()
        head = b"" if behind is None else struct.pack("<Q", len(changed))
        _write(target, head + changed + (behind or b""))

    return edit


def _write(target: Path, content: bytes) -> None:
    target.write_bytes(content)


def _values(door: str, target: Path, count: int, command: str) -> Iterator[Case]:
    """So many values, drawn with the door's name as seed, spread over the places."""
    rng = random.Random(door)
    spots = [spot for spot in _spots(json.loads(_text_of(target)[0])) if len(spot) <= _DEPTH]
    drawn = rng.sample(spots, len(spots))
    for i in range(count):
        spot, odd = drawn[i % len(drawn)], rng.choice((*ODD, None))
        told = "gone" if odd is None else _LABELS.get(odd, odd)
        yield Case(f"{'.'.join(map(str, spot))}: {told}", _set(spot, odd), command)


# --- other contents, other kinds of file --------------------------------------------------------


def _becomes(make: Edit) -> Edit:
    def edit(target: Path) -> None:
        target.unlink()
        make(target)

    return edit


def _sparse(target: Path) -> None:
    with target.open("wb") as file:
        file.truncate(1 << 40)


PLACES: dict[str, Edit] = {
    "absent": lambda target: target.unlink(),
    "a pipe": _becomes(os.mkfifo),
    "a folder": _becomes(Path.mkdir),
    "a circle": _becomes(lambda target: target.symlink_to(target.name)),
    "a device": _becomes(lambda target: target.symlink_to("/dev/zero")),
    "a terabyte": _becomes(_sparse),
    "empty": lambda target: _write(target, b""),
    "zeros": lambda target: _write(target, bytes(64)),
    "a web page": lambda target: _write(target, b"<!DOCTYPE html><html>Sign in</html>"),
    "half": lambda target: _write(target, target.read_bytes()[: target.stat().st_size // 2]),
    "UTF-16": lambda target: _write(target, "{}".encode("utf-16")),
    "a zip": lambda target: _write(target, b"PK\x03\x04" + bytes(60)),
    "GGUF": lambda target: _write(target, b"GGUF" + bytes(60)),
    "LFS": lambda target: _write(
        target, b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    ),
}


def _pickle(value: Callable[[], Any]) -> Edit:
    def edit(target: Path) -> None:
        stream = io.BytesIO()
        torch.save(value(), stream)
        _write(target, stream.getvalue())

    return edit


def _itself() -> dict[str, Any]:
    table: dict[str, Any] = {_NAME: torch.ones(24, 24)}
    table["model"] = table
    return table


TABLES: dict[str, Callable[[], Any]] = {
    "itself": _itself,
    "no tensor": dict,
    "a number as name": lambda: {3: torch.ones(24, 24)},
    "an escape as name": lambda: {"\x1b[1m.weight": torch.ones(24, 24)},
    "a list": lambda: [torch.ones(24, 24)],
}

# Cells of a table of curves: (row, column) → text.
CELLS = (
    "", "x", "NaN", "inf", "-1", "1e999", "1_000", "0x1", '"', "\x1b[31m", "=1+1", "9" * 400,
    "1.5", "\x00",
)  # fmt: skip


def _cell(row: int, column: int, text: str) -> Edit:
    def edit(target: Path) -> None:
        cells = [line.split(",") for line in target.read_text().splitlines()]
        cells[row][column] = text
        target.write_text("\n".join(map(",".join, cells)) + "\n")

    return edit


# --- tables of a report -------------------------------------------------------------------------

_SHOWN = ("--explain --verbose", "--json", "-o out.csv -o out.md --force")
# (place, value as JSON spells it): of each table that a report holds as a mapping, what renderers
# take from it; sizes, places and depths.
_IN_COMPARE: tuple[tuple[str, str | None], ...] = (
    ("layers/shape/8", "[64, 192, 64]"),
    ("layers/shape/8", "[]"),
    ("layers/verdict/2/code", None),
    ("layers/verdict/2/code", "900 braces"),
    ("layers/verdict/8/k", "[1, 2]"),
    ("layers/verdict/8/k", "1e999"),
    ("layers/verdict/8/clause", "{}"),
    ("layers/verdict/8/later", "900 braces"),
    ("layers/method/update.S/7/bound", '"x"'),
    ("layers/method/update.S/7/subspace_bound", "{}"),
    ("layers/curves/update.S/y/at", "[]"),
    ("provenance/parameters/k", "900 braces"),
    ("provenance/parameters/k", "1e999"),
    ("provenance/parameters/limits", '{"nss": "x"}'),
    ("summary/verdict/explain", '[{"code": "MIXED"}]'),
    ("summary/anchor", '{"ratios": {}, "ref": {}, "spectrum_preserving": null}'),
    ("summary/anchor", '{"ratios": {"nss": []}, "ref": {"given": "a"}, "spectrum_preserving": 1}'),
    ("summary/distance", '{"code": ["TOO_FAR"], "text": "far"}'),
    ("summary/lineage", '{"beside": [null], "parents": [5]}'),
    ("summary/lineage", '{"beside": [null, 9], "parents": [1, null]}'),
    ("summary/merging", '{"nulls": {}, "values": {"consensus": "x"}, "words": ""}'),
)
_IN_CAPACITY: tuple[tuple[str, str | None], ...] = (
    ("summary/model/tail_ratio", "1e308"),
    ("layers/verdict/12/code", None),
    ("layers/values/update.frobenius_norm", f"[{', '.join(['1e308'] * 14)}]"),
)
_FIRST = '{"schema": "geoscope.report/1", "layers": [%s]}'


def _of_reports(table: tuple[tuple[str, str | None], ...]) -> list[Case]:
    """Each of them, shown in one way after the other."""
    return [
        Case(
            f"{place}: {'gone' if odd is None else odd[:40]}, {words.split()[0]}",
            _set(_spot(place), LONG.get(odd or "", odd)),
            f"show report.json {words}",
        )
        for i, (place, odd) in enumerate(table)
        for words in (_SHOWN[i % len(_SHOWN)],)
    ]


def _spot(place: str) -> Spot:
    return tuple(int(part) if part.isdigit() else part for part in place.split("/"))


def _of_first_schema() -> list[Case]:
    """Rows and curves of the first schema that are none."""
    return [
        Case(f"of schema 1, {row}", _written(_FIRST % row), "show report.json")
        for row in ("[]", '{"curves": []}', '{"curves": {"a": [[1]]}}')
    ]


def _written(text: str) -> Edit:
    return lambda target: _write(target, text.encode())


# --- words of the command line ------------------------------------------------------------------

OPTIONS = {
    "inspect base tuned --layers": (
        "0-99999999999", "x", "-1", "3-1", "", "0,,1", "9", "0-", "1.5", "10^30"
    ),
    "inspect base tuned --include": (
        "(", "a{99999999999}", "(a+)+$", "400 parentheses", "nomatch", "\x1b[31m", "[", "*",
        "(?<=a+)b",
    ),
    "inspect base tuned --exclude": ("(", "[z-a]", "(?P<a>", "\\", "."),
    "inspect base tuned --map-name": ("(=x", "a", "=", r"(.*)=\9", r".*=\g<x>", ".*=same"),
    "inspect base tuned --lora-alpha": ("nan", "-1", "1e999", "x", "0"),
    "compare base tuned --k": ("0", "-3", "x", "", "8,8", "99999999999", "10^30", "1.5"),
    "compare base tuned --jobs": ("0", "-1", "x", "1e3", "10^30"),
    "compare base tuned --max-memory": ("0", "-1GB", "x", "1e999", "NaN", "12 parsecs", "10^30"),
    "compare base tuned --seed": ("-1", "x", "10^30"),
    "compare base tuned --solver": ("fast", ""),
    "compare base tuned --dtype": ("float16", "int8"),
    "compare base tuned --device": ("tpu", "cuda:99", "cuda:x", ""),
    "compare base tuned --limit": ("x=1", "rank_ratio", "nss=x", "nss=nan", "nss=-1"),
    "compare base tuned --fail-on": ("X", "nss>", "nss>x", ">1", "nosuch>1", "\x1b[31m"),
    "compare base tuned --part": ("0/2", "3/2", "x", "1/0", "1/10^30"),
    "compare base tuned --out": (
        "absent/x.json", "x.exe", "300 letters.json", "base", "base/config.json", "/dev/full",
        "\x1b[31m.json",
    ),
    "compare base": (
        "", "absent/folder/x", "tuned/config.json", "/dev/zero", "~nosuchuser/x", "300 letters",
        "\x1b[31mred/x/y", "http://x/y", "tuned+", "tuned+tuned", "a\nb/c/d", "base+", "+",
    ),
    "show": ("absent.json", "base/config.json", "base/model.safetensors", "base", "/dev/zero", ""),
    "join": ("absent.json", "base/config.json", "base", "/dev/zero"),
    "trajectory": ("base", "absent/x/y", "tuned/config.json", "/dev/null"),
    "verify-adapter": ("base", "absent/x/y", "/dev/null", ""),
    "init-adapter base -o out/made --rank": ("0", "-1", "x", "99999999999", "2.5", "25"),
    "init-adapter base -o out/made --method": ("nosuch", ""),
    "metrics": ("nosuch", "\x1b[31m"),
}  # fmt: skip
_SPELT = {"10^30": "1" + "0" * 30, "400 parentheses": "(" * 400, "300 letters": "x" * 300}


def _spelt(text: str) -> str:
    for label, meant in _SPELT.items():
        text = text.replace(label, meant)
    return text


def _unchanged(_: Path) -> None:
    """The inputs are right; the words are not."""


# --- all of them --------------------------------------------------------------------------------

_MODELS, _ADAPTER = "inspect base tuned", "verify-adapter adapter"
_CURVES = "trajectory run --no-directions --metric reward --metrics"
_LOG = "run/checkpoint-30/trainer_state.json"
# Of each door: the command, and how many values of its document are changed.
COMMANDS = {
    "config.json": (_MODELS, 40),
    "header": (_MODELS, 40),
    "index": (_MODELS, 24),
    "pickle": (_MODELS, 0),
    "adapter_config.json": (_ADAPTER, 60),
    "factors": (_ADAPTER, 24),
    "geoscope.json": (_ADAPTER, 40),
    "trainer_state.json": (f"{_CURVES} {_LOG}", 20),
    "metrics.csv": (f"{_CURVES} log.csv", 0),
    **dict.fromkeys(
        (door for door in DOORS if door.startswith("report")), ("show report.json", 24)
    ),
}
_OF_PLACES = (
    "config.json", "header", "index", "pickle", "adapter_config.json", "geoscope.json",
    "metrics.csv", "report of compare",
)  # fmt: skip


def cases(door: str, target: Path) -> dict[str, Case]:
    """Those of a door by their names. target: the file of its valid inputs that is changed."""
    command, count = COMMANDS[door]
    made = list(_values(door, target, count, command) if count else ())
    if door in _OF_PLACES:
        made += [Case(f"is {what}", edit, command) for what, edit in PLACES.items()]
    return {case.name: case for case in (*made, *_OF_DOORS.get(door, list[Case])())}


def _of_pickles() -> list[Case]:
    held = {what: lambda make=make: {_NAME: make()} for what, make in PACKED.items()}
    return [
        Case(f"{what}, {verb.split()[0]}", _pickle(make), f"{verb} base tuned")
        for verb, table in (("inspect", held | TABLES), ("collapse --no-resume", held))
        for what, make in table.items()
    ]


def _of_tables() -> list[Case]:
    command, _ = COMMANDS["metrics.csv"]
    return [
        Case(f"{row},{column}: {json.dumps(text):.20}", _cell(row, column, text), command)
        for row, column in ((0, 0), (2, 0), (2, 1))
        for text in CELLS
    ]


def _of_words() -> list[Case]:
    return [
        Case(f"{command} {json.dumps(text)}", _unchanged, f"{command}\0{_spelt(text)}")
        for command, texts in OPTIONS.items()
        for text in texts
    ]


_OF_DOORS = {
    "pickle": _of_pickles,
    "metrics.csv": _of_tables,
    "config.json": _of_words,
    "report of compare": lambda: [*_of_reports(_IN_COMPARE), *_of_first_schema()],
    "report of capacity": lambda: _of_reports(_IN_CAPACITY),
}
