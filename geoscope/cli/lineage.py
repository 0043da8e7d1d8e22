"""The command that asks which candidate a model is made from."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.command import check_outputs_and_conditions, exit_with_code, option_fields
from geoscope.cli.output import Show
from geoscope.verbs.lineage.options import LineageOptions

__all__ = ["lineage"]

_SHOW = (
    *("as_json", "out", "force", "strict", "quiet", "details", "verbose", "debug", "fail_on"),
    "explain",
)


def lineage(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The model in question: folder, file or org/name[@revision]."
        ),
    ],
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="CANDIDATE", help="One or more models that it may be made from, in such a form."
        ),
    ],
    *,
    show: Annotated[Show, option_fields(*_SHOW)],
    options: Annotated[
        LineageOptions,
        option_fields(
            *("include", "exclude", "layers", "map_name", "all_matrices", "limits", "seed"),
            seed=opt.SampleSeed,
        ),
    ],
) -> None:
    """Which of the candidates is a model made from?"""
    from geoscope.verbs.lineage.lineage import lineage as run
    from geoscope.verbs.lineage.report import IDS, KIND

    conditions = check_outputs_and_conditions(show, kind=KIND, ids=IDS)
    with output.matrices(quiet=show.quiet) as progress:
        report = run(model, *candidates, options=options, progress=progress, argv=sys.argv)
    output.emit(report, show)
    for note in report.provenance.parameters["notes"]:
        output.write_message(f"note: {note}", quiet=show.quiet)
    exit_with_code(report, show, conditions, done="compared")
