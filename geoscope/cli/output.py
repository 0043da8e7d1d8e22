"""Where words go: data to standard output, talk to standard error; both know what a terminal is.

All of them pass `worded`: the library names parameters, the command line its options.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from geoscope import report as reports
from geoscope.cli.wording import worded
from geoscope.errors import ReportError
from geoscope.records import Report

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from geoscope.verbs.options import Progress
    from geoscope.verbs.pairs.prepare import Prepared

__all__ = [
    "Show",
    "answer",
    "check_file",
    "check_outputs",
    "data",
    "document",
    "emit",
    "matrices",
    "progress",
    "remark",
    "say",
    "say_in_pipe",
    "take_streams",
]


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

    A reader that went away (`| head`) is no error: files are written all the same, the exit code
    stands. Anything else raises ReportError, but for talk, which nobody waits for. A letter that
    the locale cannot show is no reason to lose the report.
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
    """Text on standard output, one line end at its end."""
    sys.stdout.write(worded(text).rstrip("\n") + "\n")
    sys.stdout.flush()


def document(text: str) -> None:
    """A JSON document on standard output, in ASCII where the locale cannot show all of it."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), sort_keys=True)
    data(text)


def say(text: str, *, quiet: bool = False) -> None:
    """A remark on standard error."""
    if not quiet:
        sys.stderr.write(worded(text) + "\n")
        sys.stderr.flush()


def remark(text: str, *, quiet: bool = False) -> None:
    """A remark of one or more lines, as wide as the terminal at the most."""
    wrapped = textwrap.wrap(
        text,
        _columns(sys.stderr),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    say("\n".join(wrapped), quiet=quiet)


def say_in_pipe(text: str, *, quiet: bool = False) -> None:
    """A remark where no terminal shows a progress bar."""
    if not sys.stderr.isatty():
        say(text, quiet=quiet)


@dataclass(frozen=True, kw_only=True)
class Show:
    """What of a report is shown and written; a command takes the fields that it has a use for."""

    as_json: bool = False
    out: Sequence[Path] = ()
    force: bool = False
    strict: bool = False
    dry_run: bool = False
    quiet: bool = False
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
            data(_text(report, show))
    finally:
        for path in show.out:
            reports.write(report, path, words=worded)
            say(f"wrote {path}", quiet=show.quiet)


def answer(facts: Mapping[str, Any], text: str, show: Show) -> None:
    """What is not a report, on standard output: the facts as JSON, or the text."""
    if show.as_json:
        document(json.dumps(facts, indent=2, sort_keys=True))
    else:
        data(text)


def _text(report: Report, show: Show) -> str:
    return reports.render_text(
        report,
        width=_width(),
        colour=_colour(),
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

    def plan(prepared: Prepared) -> None:
        say(_plan_line(prepared), quiet=quiet)
        for line in _note_lines(prepared):
            if line not in noted:  # the base is the same for every tuned model
                say(line, quiet=quiet)
            noted.add(line)

    def recalled(count: int, total: int) -> None:
        say(f"{count} of {total} results from the cache (--no-resume computes anew)", quiet=quiet)

    def note(text: str) -> None:
        say(f"note: {text}", quiet=quiet)

    if quiet or not sys.stderr.isatty():
        yield Progress(on_plan=plan, on_recalled=recalled, on_note=note)
        return
    bar = _bar()
    tasks: dict[str, Any] = {}

    def planned(prepared: Prepared) -> None:
        bar.stop()
        plan(prepared)
        bar.start()
        total = len(prepared.pairing.matrices)
        tasks["matrices"] = bar.add_task("matrices", total=total)

    def paired(done: int, _total: int, _name: str) -> None:
        bar.update(tasks["matrices"], completed=done)

    with bar:
        yield Progress(
            on_download=_downloads(bar),
            on_plan=planned,
            on_pair=paired,
            on_recalled=recalled,
            on_note=note,
        )


@contextmanager
def matrices(*, quiet: bool) -> Iterator[Progress]:
    """A progress bar over matrices, on a terminal only; elsewhere what is to be fetched."""
    from geoscope.verbs.options import Progress

    def fetching(nbytes: int, free: int) -> None:
        say(_fetching(nbytes, free), quiet=quiet)

    def training(done: int, total: int) -> None:
        if done == 0:
            say(f"training {total} networks", quiet=quiet)

    if quiet or not sys.stderr.isatty():
        yield Progress(on_fetch=fetching, on_network=training)
        return
    with _bar() as bar:
        task = bar.add_task("matrices", total=None)

        def between_bars(nbytes: int, free: int) -> None:
            bar.stop()
            fetching(nbytes, free)
            bar.start()

        def paired(done: int, total: int, _name: str) -> None:
            bar.update(task, completed=done, total=total)

        def trained(done: int, total: int) -> None:
            bar.update(task, description="networks", completed=done, total=total)

        yield Progress(
            on_fetch=between_bars,
            on_download=_downloads(bar),
            on_pair=paired,
            on_network=trained,
        )


def _downloads(bar: Bar) -> Callable[[str, int, int], None]:
    """A line in the bar for each file that is being fetched."""
    tasks: dict[str, Any] = {}

    def download(file: str, done: int, total: int) -> None:
        if file not in tasks:
            tasks[file] = bar.add_task(f"fetching {file}", total=total)
        bar.update(tasks[file], completed=done, total=total, visible=done < total)

    return download


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _note_lines(prepared: Prepared) -> list[str]:
    """The notes of both sides, each under the name that its model was given by; of the pair."""
    sides = (prepared.base, prepared.tuned)
    lines = [f"note: {side.ref.given}: {note}" for side in sides for note in side.notes]
    return [*lines, *(f"note: {note}" for note in prepared.notes)]


def _plan_line(prepared: Prepared) -> str:
    pairing = prepared.pairing
    what = f"{len(pairing.matrices)} matrices of {prepared.tuned.ref.given}"
    if prepared.has_base:
        what, where = f"comparing {what}", f"with {prepared.base.ref.given}"
    else:
        what, where = f"measuring {what}", "without its base"
    where += f" on {prepared.device}"
    if prepared.bytes_to_fetch:
        where += f", {_fetching(prepared.bytes_to_fetch, prepared.free_disk or 0)}"
    return f"{what} {where}"


def _fetching(nbytes: int, free: int) -> str:
    amount = f"{nbytes / 1e6:.0f} MB" if nbytes >= 10**7 else f"{nbytes / 1e6:.2g} MB"
    return f"fetching {amount} ({free / 1e9:.3g} GB free)"
