"""Where words go: data to standard output, talk to standard error; both know what a terminal is.

All of them pass `with_option_names`: the library names parameters, the command line its options.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from geoscope import report as reports
from geoscope.cli.bars import Bars
from geoscope.cli.wording import with_option_names
from geoscope.errors import ReportError
from geoscope.foreign import printable
from geoscope.records import Report

if TYPE_CHECKING:
    from geoscope.verbs.options import Planned, Progress

__all__ = [
    "Show",
    "TextAnswer",
    "answer",
    "check_file",
    "check_outputs",
    "data",
    "document",
    "emit",
    "matrices",
    "progress",
    "remark",
    "say_in_pipe",
    "take_streams",
    "write_error",
    "write_message",
]

_SCREEN = 1600  # letters


def take_streams() -> None:
    """Standard output and standard error of this process, so that neither ends it in a traceback.

    Raises ReportError where standard output is closed: nothing could be told.
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise ReportError(
            "standard output is closed; open it, or send it to /dev/null and give -o FILE"
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Stream(sys.stdout)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stream(sys.stderr, is_talk=True)


class _Stream(io.TextIOWrapper):
    """A standard stream; what is written into it after it failed goes nowhere.

    A reader that went away (`| head`) is not an error: files are written all the same, the exit
    code stands. Anything else raises ReportError, but for talk, which nobody waits for. A letter
    that the locale cannot show is not a reason to lose the report.
    """

    def __init__(self, stream: io.TextIOWrapper, *, is_talk: bool = False) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=is_talk or stream.line_buffering,
        )
        self._is_talk = is_talk
        self._kept = stream  # which would close the buffer when it goes

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # What is still in the buffer must not fail once more when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if not (self._is_talk or isinstance(error, BrokenPipeError)):
            raise ReportError(
                f"standard output cannot be written: {error.strerror or error}; make room, or send "
                "it elsewhere"
            ) from None


def data(text: str) -> None:
    """Text on standard output, one line end at its end, and no letter that steers a terminal."""
    _put(printable(with_option_names(text), lines=True))


def _put(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def document(text: str) -> None:
    """A JSON document on standard output, in ASCII where not all of it can be shown."""
    text = with_option_names(text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
        can_be_shown = printable(text, lines=True) == text
    except UnicodeEncodeError:
        can_be_shown = False
    _put(text if can_be_shown else json.dumps(json.loads(text), sort_keys=True))


def write_message(text: str, *, quiet: bool = False) -> None:
    """A remark on standard error."""
    if not quiet:
        sys.stderr.write(printable(with_option_names(text), lines=True) + "\n")
        sys.stderr.flush()


def write_error(text: str) -> None:
    """The one line about what went wrong, on standard error: no longer than a screen."""
    line = printable(text)
    write_message(f"geoscope: {line if len(line) <= _SCREEN else f'{line[:_SCREEN]}…'}")


def remark(text: str, *, quiet: bool = False) -> None:
    """A remark of one or more lines, as wide as the terminal at the most."""
    write_message(_wrapped(text, _columns(sys.stderr)), quiet=quiet)


def _wrapped(text: str, width: int) -> str:
    lines = textwrap.wrap(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def say_in_pipe(text: str, *, quiet: bool = False) -> None:
    """A remark where no terminal shows a progress bar."""
    if not sys.stderr.isatty():
        write_message(text, quiet=quiet)


@dataclass(frozen=True, kw_only=True)
class Show:
    """What of a report is shown and written; a command takes the fields that it has a use for."""

    as_json: bool = False
    out: Sequence[Path] = ()
    style: str = reports.STYLES[0]
    force: bool = False
    strict: bool = False
    dry_run: bool = False
    quiet: bool = False
    details: bool = False
    verbose: bool = False
    debug: bool = False
    fail_on: str | None = None
    explain: bool = False


def emit(report: Report, show: Show) -> None:
    """The report on standard output, and into each file of `--out`, whatever became of that."""
    try:
        if show.as_json:
            document(report.dumps())
        else:
            _put(
                with_option_names(_text(report, show))
            )  # printable by itself: escapes in it are our colours
    finally:
        for path in show.out:
            reports.write(report, path, style=show.style, words=with_option_names)
            write_message(f"wrote {path}", quiet=show.quiet)


@dataclass(frozen=True)
class TextAnswer:
    """What a command says that makes no report.

    title: what it is about.
    headline: the answer.
    lines: what stands below it.
    """

    title: str
    headline: str
    lines: Sequence[str]

    @property
    def text(self) -> str:
        """Within 80 columns, as far as paths allow."""
        lines = (self.title, "", self.headline, *self.lines)
        return "\n".join(_wrapped(line, 80) for line in lines)


def answer(facts: Mapping[str, Any], told: TextAnswer, show: Show) -> None:
    """What is not a report, on standard output: the facts as JSON, or the text; its headline."""
    if show.as_json:
        document(json.dumps(facts, indent=2, sort_keys=True))
    else:
        data(told.headline if show.quiet else told.text)


def _text(report: Report, show: Show) -> str:
    if show.quiet and not (show.details or show.verbose or show.explain):
        return reports.render_headline(report)
    return reports.render_text(
        report,
        width=_width(),
        colour=_colour(),
        details=show.details,
        verbose=show.verbose,
        explain=show.explain,
    )


def check_outputs(paths: Sequence[Path], *, force: bool) -> None:
    """Refuses what could not be written later. Raises OptionError or ReportError."""
    for path in paths:
        reports.check_output(path, force=force)


def check_file(path: Path, suffix: str, *, force: bool) -> None:
    """Like `check_outputs`, for a file that is not a report."""
    reports.check_output(path, force=force, suffixes=(suffix,))


def _width() -> int:
    return _columns(sys.stdout)


def _columns(stream: TextIO) -> int:
    """Columns of the terminal; 80 in a pipe."""
    return min(shutil.get_terminal_size((80, 24)).columns, 140) if stream.isatty() else 80


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """A progress bar with the time left, on a terminal only; elsewhere one line a model."""
    from geoscope.verbs.options import Progress

    noted: set[str] = set()

    def plan(planned: Planned) -> None:
        write_message(_plan_line(planned), quiet=quiet)
        for note in planned.notes:
            if note not in noted:  # the base is the same for every tuned model
                write_message(f"note: {note}", quiet=quiet)
            noted.add(note)

    def recalled(count: int, total: int) -> None:
        write_message(
            f"{count} of {total} results from the cache (--no-resume computes anew)", quiet=quiet
        )

    def note(text: str) -> None:
        write_message(f"note: {text}", quiet=quiet)

    if quiet or not sys.stderr.isatty():
        yield Progress(on_plan=plan, on_recalled=recalled, on_note=note)
        return
    with Bars() as bars:
        yield Progress(
            on_download=bars.fetched,
            on_plan=bars.between(plan),
            on_pair=bars.counted("matrices"),
            on_recalled=bars.between(recalled),
            on_note=bars.between(note),
        )


@contextmanager
def matrices(*, quiet: bool) -> Iterator[Progress]:
    """A progress bar over matrices, on a terminal only; elsewhere what is to be fetched."""
    from geoscope.verbs.options import Progress

    def fetching(nbytes: int, free: int) -> None:
        write_message(_fetching(nbytes, free), quiet=quiet)

    def training(done: int, total: int) -> None:
        if done == 0:
            write_message(f"training {total} networks", quiet=quiet)

    def recalled(count: int, total: int) -> None:
        write_message(
            f"{count} of {total} results from the cache (--no-resume computes anew)", quiet=quiet
        )

    if quiet or not sys.stderr.isatty():
        yield Progress(on_fetch=fetching, on_network=training, on_recalled=recalled)
        return
    with Bars() as bars:
        yield Progress(
            on_fetch=bars.between(fetching),
            on_download=bars.fetched,
            on_pair=bars.counted("matrices"),
            on_network=bars.counted("networks"),
            on_recalled=recalled,
        )


def _plan_line(plan: Planned) -> str:
    matrices = f"{plan.matrices} matrices of {plan.tuned}"
    work = f"measuring {matrices} without its base"
    if plan.base is not None:
        work = f"comparing {matrices} with {plan.base}"
    work += f" on {plan.device}"
    if plan.bytes_to_fetch:
        work += f", {_fetching(plan.bytes_to_fetch, plan.free_disk or 0)}"
    return work


def _fetching(nbytes: int, free: int) -> str:
    amount = f"{nbytes / 1e6:.0f} MB" if nbytes >= 10**7 else f"{nbytes / 1e6:.2g} MB"
    return f"fetching {amount} ({free / 1e9:.3g} GB free)"
