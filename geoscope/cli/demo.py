"""`geoscope demo`: the five-minute tour on a real run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from geoscope.cli import options as opt
from geoscope.cli import output

__all__ = ["demo"]


@opt.with_options({name: opt.OUTPUT[name] for name in ("quiet", "debug")})
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to unpack it.")] = Path(
        "geoscope-demo"
    ),
    **options: Any,
) -> None:
    """The five-minute tour, on a small real run."""
    from geoscope.demo import unpack
    from geoscope.demo.story import story
    from geoscope.verbs.pairs.compare import compare

    quiet = options["quiet"]
    fresh = unpack(folder)
    output.say(f"{'unpacked' if fresh else 'using'} the demo run in {folder}", quiet=quiet)
    steps = sorted((folder / "grpo").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    with output.progress(quiet=quiet) as progress:
        report = compare(
            folder / "base", steps[-1], kind="collapse", progress=progress, argv=sys.argv
        )
    output.emit(report, {**options, "as_json": False, "out": None, "verbose": False})
    output.data(story(folder, steps, report))
