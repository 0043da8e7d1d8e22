"""Commands that need no model: a saved report again, the table of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.fail_on import holding, parse_fail_on
from geoscope.kinds import KINDS

__all__ = ["metrics", "show"]


@opt.with_options(
    {name: opt.OUTPUT[name] for name in ("as_json", "out", "force", "quiet", "verbose", "debug")},
    opt.FAIL_ON,
    {"explain": opt.VERDICT["explain"]},
)
def show(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT.json", help="A report that geoscope wrote as JSON.")
    ],
    **options: Any,
) -> None:
    """Render a saved report, without the weights."""
    from geoscope import report as reports

    output.check_outputs(options["out"], force=options["force"])
    found = reports.read(report)
    conditions = parse_fail_on(
        options["fail_on"],
        kind=found.kind,
        codes=KINDS[found.kind].codes if found.summary.verdict and found.kind in KINDS else (),
        ids=found.summary.model.keys(),
    )
    output.emit(found, options)
    if met := holding(conditions, found):
        output.say(f"geoscope: --fail-on: {', '.join(met)}")
        raise typer.Exit(3)


@opt.with_options({"as_json": opt.OUTPUT["as_json"]})
def metrics(
    metric: Annotated[str | None, typer.Argument(metavar="ID", help="One metric, whole.")] = None,
    **options: Any,
) -> None:
    """The metrics: formula, null, reading, caution."""
    from geoscope.metrics import METRICS, describe

    chosen = None if metric is None else describe.find(metric)
    if options["as_json"]:
        output.document(describe.dumps(METRICS if chosen is None else (chosen,)))
    else:
        output.data(describe.listing() if chosen is None else describe.describe(chosen))
