"""`geoscope cache list|clear`: the kept results, tensors of Hub models and factors."""

from __future__ import annotations

import typer

from geoscope.cli import output
from geoscope.cli.help import GroupedCommand

__all__ = ["app"]

app = typer.Typer(
    help="The kept results, tensors and factors.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list", cls=GroupedCommand)
def show() -> None:
    """Where results, tensors and factors are kept, how many, and their size."""
    from geoscope.verbs.caches import caches

    for kept in caches():
        size = sum(kept.sizes) / 1e6
        output.data(f"{kept.folder}\n{len(kept.sizes)} {kept.what}, {size:.1f} MB")


@app.command(cls=GroupedCommand)
def clear() -> None:
    """Remove every kept result, tensor and factor."""
    from geoscope.verbs.caches import caches

    for kept in caches():
        output.data(f"removed {kept.clear()} {kept.what} from {kept.folder}")
