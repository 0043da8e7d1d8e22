"""One comparison in parts, on as many machines, and the parts joined to the report of the whole.

    part = compare_part("base/", "tuned/", (3, 8), kind="collapse")      the third of eight
    report = join([part, …])                                            all eight

The parts share out the matrices by files and by work, from headers alone, so that every machine
comes to the same division. A part holds what the report needs of its matrices; joining takes no
weights, and gives the report that one machine gives, byte for byte, but for the time it took.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from geoscope._version import __version__
from geoscope.arguments import Place, path_text
from geoscope.errors import OptionError, ReportError
from geoscope.files import replacing
from geoscope.foreign import INDEX, parsed, reason, shown, small_text
from geoscope.kinds import KINDS
from geoscope.records import LayerRecord, Report, decode, encode
from geoscope.verbs.options import Interrupted, Options, Progress
from geoscope.verbs.pairs.about import About, about
from geoscope.verbs.pairs.alone import prepare_alone
from geoscope.verbs.pairs.assemble import assemble
from geoscope.verbs.pairs.measuring import Work, kept_results, measure_pairs
from geoscope.verbs.pairs.prepare import prepare, within
from geoscope.verbs.pairs.rows import PartMatrix, matrix_of, part_of
from geoscope.verbs.pairs.run import judged_run
from geoscope.verbs.pairs.shares import shares

__all__ = ["SCHEMA", "Part", "compare_part", "join", "read_part", "write_part"]

SCHEMA = "geoscope.part/1"


@dataclass(frozen=True)
class Part:
    """One of several parts of a comparison.

    number, of: the third of eight is 3, 8.
    options: those that decide the numbers.
    """

    number: int
    of: int
    tool_version: str
    kind: str
    options: Mapping[str, Any]
    about: About
    matrices: tuple[PartMatrix, ...]
    vectors: tuple[LayerRecord, ...]
    seconds: float

    def dumps(self) -> str:
        """Strict JSON, keys sorted, with its checksum."""
        data = {"schema": SCHEMA, **encode(self)}
        return _dumps(data | {"sha256": _checksum(data)})

    @classmethod
    def loads(cls, text: str) -> Part:
        """What `dumps` wrote. Raises ReportError on anything else."""
        try:
            data = parsed(text)
        except ValueError as error:
            raise ReportError(f"not JSON: {error}") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            told = f"schema is {shown(schema)}, needs {SCHEMA!r}"
            raise ReportError(f"{told}; give what `part` wrote")
        try:
            if data.pop("sha256", None) != _checksum(data):
                raise ReportError(
                    "it was changed after it was written, or an earlier version wrote it; compute "
                    "this part again"
                )
            return decode(cls, data)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ReportError(
                f"not a complete {SCHEMA} document ({type(error).__name__}: {error}); compute "
                "this part again"
            ) from None


def _dumps(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, allow_nan=False)


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dumps(data).encode()).hexdigest()


def compare_part(
    base: Place | None,
    tuned: Place,
    part: tuple[int, int],
    *,
    kind: str = "compare",
    options: Options | None = None,
    progress: Progress | None = None,
) -> Part:
    """One part of a comparison of two models; base None: of an adapter alone.

    part: its number, from 1, and how many there are. kind, options: as of `compare`; all parts
    take the same. Raises GeoscopeError, Interrupted on Ctrl-C (what is done is kept in the cache).
    """
    options, progress = options or Options(), progress or Progress()
    _check(part, kind, options)
    started = time.perf_counter()
    text = path_text(tuned, "tuned")
    if base is None:
        prepared = prepare_alone(text, options, progress)
    else:
        prepared = prepare(path_text(base, "base"), text, options, progress)
    own = shares(prepared.pairing.matrices, part[1])[part[0] - 1]
    vectors = prepared.pairing.vectors if part[0] == 1 else ()
    progress.on_plan(replace(prepared.planned, matrices=len(own)))
    narrow = within(prepared, own, vectors, options)
    work = measure_pairs(narrow, kind, options, progress, kept_results(options))
    if work.interrupted is not None:
        raise Interrupted(None, work.interrupted)
    return Part(
        number=part[0],
        of=part[1],
        tool_version=__version__,
        kind=kind,
        options=options.deciding,
        about=about(prepared),
        matrices=tuple(map(part_of, work.matrices)),
        vectors=work.vectors,
        seconds=time.perf_counter() - started,
    )


def _check(part: tuple[int, int], kind: str, options: Options) -> None:
    number, of = part
    if not 1 <= number <= of:
        raise OptionError(f"`part` {number}/{of}: write I/N with 1 ≤ I ≤ N, such as 3/8")
    if kind not in KINDS or not KINDS[kind].families:
        raise OptionError(f"kind {kind!r} cannot be computed in parts")
    if options.ray is not None:
        raise OptionError("`part` and `ray` both share out the matrices; give one of them")


# --- joining --------------------------------------------------------------------------------------


def join(
    parts: Sequence[Part], *, names: Sequence[str] | None = None, argv: Sequence[str] = ()
) -> Report:
    """The report of all parts, in any order. names: how messages call them.

    Raises ReportError for a part that is missing, doubled, or of another comparison.
    """
    called = list(names or (f"part {part.number}" for part in parts))
    _check_parts(parts, called)
    first = parts[0]
    options = _options(first.options)
    known = {each.record.name: each for part in parts for each in part.matrices}
    pairing = first.about.pairing
    lacking = [pair.name for pair in pairing.matrices if pair.name not in known]
    if lacking:
        raise ReportError(f"{len(lacking)} matrices are in no part, first {lacking[0]}")
    matrices = tuple(
        matrix_of(pair, known[pair.name], first.kind, options) for pair in pairing.matrices
    )
    vectors = tuple(record for part in parts for record in part.vectors)
    devices = dict.fromkeys(part.about.device for part in sorted(parts, key=_number))
    said = replace(first.about, device=", ".join(devices))
    run = judged_run(said, Work(matrices, vectors), first.kind, options)
    seconds = sum(part.seconds for part in parts)
    return assemble([said], [run], first.kind, options, argv, seconds)


def _number(part: Part) -> int:
    return part.number


def _check_parts(parts: Sequence[Part], names: Sequence[str]) -> None:
    if not parts:
        raise ReportError("no part was given; give all files that `part` wrote")
    first, of = parts[0], parts[0].of
    for part, name in zip(parts, names, strict=True):
        if (what := _foreign(part, first)) is not None:
            raise ReportError(f"{name}: {what} than {names[0]}; join parts of one comparison")
    places: dict[int, list[str]] = {}
    for part, name in zip(parts, names, strict=True):
        places.setdefault(part.number, []).append(name)
    for number, named in sorted(places.items()):
        if len(named) > 1:
            raise ReportError(f"part {number} of {of} is there twice: {' and '.join(named[:2])}")
    lacking = [str(number) for number in range(1, of + 1) if number not in places]
    if lacking:
        shown = ", ".join(lacking[:8]) + (" …" if len(lacking) > 8 else "")
        raise ReportError(f"{len(lacking)} of {of} parts are missing: {shown}; compute them first")


def _foreign(part: Part, first: Part) -> str | None:
    """In what a part differs from the first; None where both are of one comparison."""
    here, there = part.about, first.about
    checks = (
        ("another version of geoscope", part.tool_version, first.tool_version),
        ("another number of parts", part.of, first.of),
        ("another kind of report", part.kind, first.kind),
        ("other options", part.options, first.options),
        ("other models", (here.base, here.tuned), (there.base, there.tuned)),
        ("other tensors", here.pairing, there.pairing),
    )
    return next((f"is of {what}" for what, mine, other in checks if mine != other), None)


def _options(kept: Mapping[str, Any]) -> Options:
    known = {each.name for each in fields(Options)}
    return Options(**{name: value for name, value in kept.items() if name in known})


def write_part(part: Part, path: Path) -> None:
    """Writes a part as JSON; nothing half-written stays. Raises ReportError."""
    try:
        with replacing(path) as file:
            file.write(part.dumps().encode() + b"\n")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from None


def read_part(path: Path) -> Part:
    """Reads what `write_part` wrote. Raises ReportError, which names the file."""
    try:
        return Part.loads(small_text(path, INDEX))
    except OSError as error:
        told = f"{path} cannot be read: {reason(error)}; give what `part` wrote"
        raise ReportError(told) from None
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from None
