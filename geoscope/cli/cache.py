"""`geoscope cache list|clear`: the kept results."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from geoscope.cli import output

__all__ = ["app", "results_folder"]

app = typer.Typer(
    help="The kept results of earlier runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def results_folder() -> Path:
    """$GEOSCOPE_CACHE, else $XDG_CACHE_HOME/geoscope, else ~/.cache/geoscope."""
    own = os.environ.get("GEOSCOPE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(shared) / "geoscope") / "results"


@app.command("list")
def show() -> None:
    """Where results are kept, how many, and their size."""
    from geoscope.engine.cache import ResultCache

    cache = ResultCache(results_folder())
    sizes = [path.stat().st_size for path in cache.files()]
    output.data(f"{cache.folder}\n{len(sizes)} results, {sum(sizes) / 1e6:.1f} MB")


@app.command()
def clear() -> None:
    """Remove every kept result."""
    from geoscope.engine.cache import ResultCache

    cache = ResultCache(results_folder())
    output.data(f"removed {cache.clear()} results from {cache.folder}")
