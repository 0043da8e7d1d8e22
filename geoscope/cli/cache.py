"""`geoscope cache list|clear`: the kept results, and the kept tensors of Hub models."""

from __future__ import annotations

from pathlib import Path

import typer

from geoscope.cli import output
from geoscope.folders import cache_folder

__all__ = ["app", "results_folder"]

app = typer.Typer(
    help="The kept results, and tensors of Hub models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def results_folder() -> Path:
    """Where results are kept."""
    return cache_folder() / "results"


@app.command("list")
def show() -> None:
    """Where results and tensors are kept, how many, and their size."""
    from geoscope.engine.cache import ResultCache
    from geoscope.sources.hub.range_cache import kept_tensors, tensors_folder

    cache = ResultCache(results_folder())
    for folder, what, files in (
        (cache.folder, "results", cache.files()),
        (tensors_folder(), "tensors of Hub models", kept_tensors()),
    ):
        sizes = [path.stat().st_size for path in files]
        output.data(f"{folder}\n{len(sizes)} {what}, {sum(sizes) / 1e6:.1f} MB")


@app.command()
def clear() -> None:
    """Remove every kept result and tensor."""
    from geoscope.engine.cache import ResultCache
    from geoscope.sources.hub.range_cache import clear_tensors, tensors_folder

    cache = ResultCache(results_folder())
    output.data(f"removed {cache.clear()} results from {cache.folder}")
    output.data(f"removed {clear_tensors()} tensors of Hub models from {tensors_folder()}")
