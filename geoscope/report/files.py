"""Reports as files: the suffix says the format, and a file is there complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from geoscope.arguments import Place, path_of
from geoscope.errors import OptionError, ReportError
from geoscope.files import encoded, replacing
from geoscope.foreign import INDEX, reason, small_text
from geoscope.records import Report

__all__ = ["STYLES", "SUFFIXES", "check_output", "read", "write"]

# The schema of the geoscope.json that lies in adapter folders.
_ADAPTER_RECORD = '"schema": "geoscope.adapter/'
SUFFIXES = (".json", ".html", ".csv", ".md", ".png", ".svg", ".pdf")
STYLES = ("screen", "paper")


def check_output(path: Path, *, force: bool, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse an output before the work: unknown suffix, no folder, a file that is already there.

    Raises OptionError for what another option mends, ReportError for what the disk says.
    """
    _check_suffix(path, suffixes)
    folder = path.parent
    if not folder.is_dir():
        raise ReportError(f"{path}: folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ReportError(f"{path}: folder {folder} is not writable; choose another place")
    if path.is_dir():
        raise OptionError(f"{path} is a folder; name a file in it")
    if path.exists() and not force:
        raise OptionError(f"{path} exists; use `force` to overwrite it, or another name")


def _check_suffix(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    if path.suffix.lower() in suffixes:
        return
    what = "no report format; use one of " if suffixes is SUFFIXES else "not "
    raise OptionError(f"{path}: suffix {path.suffix!r} is {what}{', '.join(suffixes)}")


def write(
    report: Report,
    path: Place,
    *,
    style: str = STYLES[0],
    words: Callable[[str], str] | None = None,
) -> None:
    """Write a report in the format of the suffix. Nothing half-written stays behind.

    style: of figures, for the screen or for paper.
    words: what becomes of the text of JSON, Markdown and HTML, whose notes name parameters.
    """
    path = path_of(path, "path")
    _check_suffix(path)
    content = _rendered(report, path.suffix.lower(), style, words or str)
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from None


def _rendered(report: Report, suffix: str, style: str, words: Callable[[str], str]) -> bytes:
    match suffix:
        case ".json":
            return encoded(words(_json(report)))
        case ".csv":
            from geoscope.report.csvs import render_csv

            return encoded(render_csv(report))
        case ".md":
            from geoscope.report.markdown import render_markdown

            return encoded(words(render_markdown(report)))
        case ".html":
            from geoscope.report.html.document import render_html

            return encoded(words(render_html(report)))
        case _:
            from geoscope.report.figures import render_figure

            return render_figure(report, suffix, style)


def _json(report: Report) -> str:
    return report.dumps() + "\n"


def read(path: Place) -> Report:
    """Read a JSON report. Raises ReportError, one line, on anything else."""
    path = path_of(path, "path")
    try:
        text = small_text(path, INDEX)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {reason(error)}; name a report.json") from None
    try:
        return Report.loads(text)
    except ReportError as error:
        if _ADAPTER_RECORD in text:
            raise ReportError(
                f"{path}: is the record of an adapter folder and no report; `geoscope "
                f"verify-adapter {path.parent}` reads it"
            ) from None
        raise ReportError(f"{path}: {error}") from None
