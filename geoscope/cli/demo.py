"""`geoscope demo`: the five-minute tour on a real run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from geoscope.cli import output
from geoscope.cli.command import option_fields
from geoscope.cli.output import Show

__all__ = ["demo"]


def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to unpack it.")] = Path(
        "geoscope-demo"
    ),
    *,
    show: Annotated[Show, option_fields("quiet", "debug")],
) -> None:
    """The five-minute tour, on a small real run."""
    from geoscope.demo import unpack
    from geoscope.demo.story import FAILED, story
    from geoscope.verbs.pairs.compare import compare

    fresh = unpack(folder)
    output.write_message(
        f"{'unpacked' if fresh else 'using'} the demo run in {folder}", quiet=show.quiet
    )
    steps = sorted((folder / "grpo").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    with output.progress(quiet=show.quiet) as progress:
        shown = [steps[-1]] if show.quiet else [steps[-1], folder / FAILED]
        report, *failed = [
            compare(folder / "base", tuned, kind="collapse", progress=progress, argv=sys.argv)
            for tuned in shown
        ]
    output.emit(report, show)
    if failed:
        output.data(story(folder, steps, report, *failed))
