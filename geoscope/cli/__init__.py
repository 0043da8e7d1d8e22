"""The command line: thin commands over the library. Heavy imports happen inside command bodies."""

from __future__ import annotations

from functools import cache as once
from typing import Annotated, Any

import typer
from typer.main import get_command

from geoscope._version import __version__
from geoscope.cli import adapters, cache, demo, lineage, output, pairs, reading, series, watch
from geoscope.cli.command import as_typer_command
from geoscope.cli.help import GroupedCommand
from geoscope.cli.versions import versions
from geoscope.cli.wording import with_option_names
from geoscope.errors import GeoscopeError

__all__ = ["app", "command_line", "told"]

_EPILOG = (
    "Exit codes: 0 success, whatever was found; 1 error, nothing compared, or not everything "
    "compared, with --strict; 2 wrong usage; 3 --fail-on holds; 130 interrupted; "
    "143 terminated."
)


app = typer.Typer(
    name="geoscope",
    help="What RLVR post-training did to the weights: anisotropy, alignment, spectral collapse.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        output.data(f"geoscope {__version__}\n{versions()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _command in (
    pairs.inspect,
    pairs.collapse,
    pairs.anisotropy,
    pairs.alignment,
    pairs.compare,
    pairs.capacity,
    lineage.lineage,
    series.trajectory,
    series.extrapolate,
    watch.watch,
    adapters.init_adapter,
    adapters.verify_adapter,
    adapters.convert_adapter,
    reading.show,
    reading.join,
    reading.metrics,
    reading.schema,
    demo.demo,
):
    app.command(cls=GroupedCommand, epilog=_EPILOG)(as_typer_command(_command))
app.add_typer(cache.app, name="cache")


@once
def command_line() -> Any:
    """The commands and their options, read from the functions of `app` once a process."""
    return get_command(app)


def told(error: GeoscopeError) -> str:
    """The error's line with options where the library names parameters."""
    return with_option_names(str(error))
