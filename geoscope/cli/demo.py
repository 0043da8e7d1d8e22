"""`geoscope demo`: the five-minute tour on a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geoscope.cli import output

__all__ = ["demo"]


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to unpack it.")] = Path(
        "geoscope-demo"
    ),
) -> None:
    """The five-minute tour, on a small real run."""
    from geoscope.analysis import compare
    from geoscope.demo import unpack
    from geoscope.demo.story import story

    fresh = unpack(folder)
    output.say(f"{'unpacked' if fresh else 'using'} the demo run in {folder}")
    steps = sorted((folder / "grpo").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    with output.progress(quiet=False) as progress:
        report = compare(folder / "base", steps[-1], kind="collapse", progress=progress)
    options = {"as_json": False, "out": None, "quiet": False, "verbose": False}
    output.emit(report, options)
    output.data(story(folder, steps, report))
