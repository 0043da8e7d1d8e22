"""The command line: thin commands over the library. Heavy imports happen inside command bodies."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from geoscope import __version__
from geoscope.cli import cache, demo, pairs, reading

__all__ = ["app"]

_EPILOG = (
    "Exit codes: 0 done, findings included; 1 error, nothing compared, or incomplete under "
    "--strict; 2 usage; 3 a --fail-on condition holds; 130 interrupted; 143 terminated."
)


class _Command(TyperCommand):
    """A command whose help calls arguments by their names alone: not `TUNED <list[str]>`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for one in self.params:
            if one.param_type_name == "argument":
                vars(one)["display_type_rich"] = lambda ctx: None
        super().format_options(ctx, formatter)


app = typer.Typer(
    name="geoscope",
    help="What RLVR post-training did to the weights: anisotropy, alignment, spectral collapse.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"geoscope {__version__}")
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
    reading.show,
    reading.metrics,
    demo.demo,
):
    app.command(cls=_Command, epilog=_EPILOG)(_command)
app.add_typer(cache.app, name="cache")
