"""What did the run report at its steps? Curves by name, for correlation with the weights.

    trainer_state.json      `log_history` of transformers and TRL; a checkpoint folder has one
    FILE.csv                a header with a `step` column
    FILE.jsonl              an object with `step` on each line; objects in it are named a/b

A cell that is empty, no number, NaN or infinite is left out, and so is a column without numbers.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, CheckpointNotFound, OptionError
from geoscope.foreign import INDEX, local_path, reason, small_text
from geoscope.formats.layout import parse_object
from geoscope.sources.series import Series

__all__ = ["TRAINER_STATE", "Curves", "read_metrics", "trainer_state_of"]

TRAINER_STATE = "trainer_state.json"
Curves = dict[str, dict[int, float]]

_STEP = "step"
_Rows = Iterable[tuple[str, Mapping[str, Any]]]  # where a row stands, and its columns


def trainer_state_of(series: Series) -> Path | None:
    """`trainer_state.json` of the last checkpoint, which holds the log of all steps before it."""
    last = series.points[-1]
    if last.checkpoint is not None and last.checkpoint.ref.commit is not None:
        return None  # on the Hub
    path = local_path(last.given)
    state = (path if path.is_dir() else path.parent) / TRAINER_STATE
    return state if state.is_file() else None


def read_metrics(path: str | Path) -> Curves:
    """Name → {step: value}, steps ascending, from a file or a folder with trainer_state.json.

    Of a name that trainer_state.json logs twice at a step, the later counts; in CSV and JSONL two
    different values are an error. Raises OptionError for another kind of file, CheckpointError for
    one that cannot be used.
    """
    file = local_path(path)
    if file.is_dir():
        file = file / TRAINER_STATE
    suffix = file.suffix.lower()
    if suffix not in (".json", ".csv", ".jsonl"):
        raise OptionError(f"{path}: needs {TRAINER_STATE}, a .csv or a .jsonl with a step column")
    text = _text(file)
    if suffix == ".json":
        return _curves(_history(text, str(file)), str(file), later_counts=True)
    return _curves(_ROWS[suffix](text, str(file)), str(file), later_counts=False)


def _text(file: Path) -> str:
    try:
        return small_text(file, INDEX, encoding="utf-8-sig")
    except FileNotFoundError:
        raise CheckpointNotFound(f"{file}: no such file of metrics") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {reason(error)}") from None


def _history(text: str, label: str) -> _Rows:
    history = parse_object(text, label).get("log_history")
    if not isinstance(history, list):
        raise CheckpointError(f"{label}: has no log_history; give {TRAINER_STATE} of a checkpoint")
    for number, entry in enumerate(history, 1):
        if isinstance(entry, Mapping):
            yield f"entry {number}", entry


def _csv(text: str, label: str) -> _Rows:
    reader = csv.DictReader(StringIO(text))
    try:
        names = list(reader.fieldnames or ())
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise CheckpointError(f"{label}: column {twice!r} is there twice; rename one of them")
        for row in reader:
            cells = {name: cell for name, cell in row.items() if name is not None}
            yield f"line {reader.line_num}", {name: _number(cell) for name, cell in cells.items()}
    except csv.Error as error:
        raise CheckpointError(f"{label}: line {reader.line_num} is not CSV: {error}") from None


def _number(cell: Any) -> Any:
    """The number in a cell of text, else the text."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell


def _jsonl(text: str, label: str) -> _Rows:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"line {number}"
            yield where, dict(_flat(parse_object(line, f"{label}, {where}")))


def _flat(row: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


_ROWS = {".csv": _csv, ".jsonl": _jsonl}


def _curves(rows: _Rows, label: str, *, later_counts: bool) -> Curves:
    found: Curves = {}
    count = 0
    for where, row in rows:
        count += 1
        column = next((name for name in row if str(name).strip().lower() == _STEP), None)
        if column is None:
            raise CheckpointError(f"{label}: no step column in {where}; add one with whole numbers")
        step = _step(row[column], f"{label}: {where}")
        for name, value in row.items():
            number = _finite(value)
            if name == column or number is None:
                continue
            curve = found.setdefault(name, {})
            if not later_counts and curve.get(step, number) != number:
                raise CheckpointError(
                    f"{label}: {name} has two values at step {step}, {curve[step]:g} and "
                    f"{number:g} ({where}); keep one row for each step"
                )
            curve[step] = number
    if not found:
        seen = f"{count} rows" if count else "it is empty"
        raise CheckpointError(f"{label}: no numbers beside the step ({seen}); give another file")
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def _step(value: Any, where: str) -> int:
    number = _finite(value)
    if number is None or number != int(number) or number < 0:
        shown = json.dumps(value, default=str)
        raise CheckpointError(f"{where}: step is {shown}, and must be a whole number from 0 on")
    return int(number)


def _finite(value: Any) -> float | None:
    """As a float; None for what is not a number, not finite, or too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
