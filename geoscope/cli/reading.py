"""Commands that need no model: a saved report again, the table of metrics, the schema."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.command import check_outputs_and_conditions, exit_with_code, option_fields
from geoscope.cli.output import Show

__all__ = ["join", "metrics", "schema", "show"]

Shown = Annotated[
    Show,
    option_fields(
        "as_json",
        "out",
        "style",
        "force",
        "quiet",
        "details",
        "verbose",
        "debug",
        "fail_on",
        "explain",
    ),
]


def show(
    path: Annotated[
        Path, typer.Argument(metavar="REPORT.json", help="A report that geoscope wrote as JSON.")
    ],
    *,
    show: Shown,
) -> None:
    """Render a saved report, without the weights."""
    from geoscope import report as reports

    output.check_outputs(show.out, force=show.force)
    report = reports.read(path)
    codes = None if report.summary.verdict else ()
    conditions = check_outputs_and_conditions(
        show, kind=report.kind, codes=codes, ids=report.summary.model.keys()
    )
    output.emit(report, show)
    exit_with_code(report, show, conditions)


def join(
    parts: Annotated[
        list[Path], typer.Argument(metavar="PART.json …", help="All files that --part wrote.")
    ],
    *,
    show: Annotated[
        Show,
        option_fields(
            *("as_json", "out", "style", "force", "strict", "quiet", "verbose", "debug", "fail_on"),
            "explain",
        ),
    ],
) -> None:
    """One report of the parts that `--part` wrote."""
    from geoscope.verbs.pairs.parts import join as run
    from geoscope.verbs.pairs.parts import read_part

    output.check_outputs(show.out, force=show.force)
    opened = [read_part(path) for path in parts]
    report = run(opened, names=[str(path) for path in parts], argv=sys.argv)
    codes = None if report.summary.verdict else ()
    conditions = check_outputs_and_conditions(
        show, kind=report.kind, codes=codes, ids=report.summary.model.keys()
    )
    output.emit(report, show)
    exit_with_code(report, show, conditions, done="compared")


def metrics(
    metric: Annotated[str | None, typer.Argument(metavar="ID", help="One metric, whole.")] = None,
    *,
    as_json: opt.AsJson = False,
) -> None:
    """The metrics: formula, null, reading, caution."""
    from geoscope.metrics import METRICS, describe

    chosen = None if metric is None else describe.find(metric)
    if as_json:
        output.document(describe.dumps(METRICS if chosen is None else (chosen,)))
    else:
        output.data(describe.listing() if chosen is None else describe.describe(chosen))


def schema() -> None:
    """The JSON Schema of reports."""
    from importlib.resources import files

    output.data(files("geoscope.records").joinpath("report.schema.json").read_text("utf-8"))
