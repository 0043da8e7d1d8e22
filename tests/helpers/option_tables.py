"""The tables of options on the pages of the commands, made of the commands themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from geoscope.cli import app

__all__ = ["with_table"]

HEAD = "| option | default | meaning |\n|---|---|---|\n"
_CODE = re.compile(r"(?<![`\w-])(--[a-z][a-z0-9-]+|[A-Z]{2,}(?:_[A-Z]+)+(?:=1)?|FILE\.\{[^}]*\})")
_TABLE = re.compile(r"^\| option \|.*?\n(?=\n|\Z)", re.MULTILINE | re.DOTALL)
_DEFAULT = re.compile(r" Default: (.*)\.$")

# Where more is written about an option, of one command or of all.
MORE = {
    "--allow-vocab-resize": "../formats.md#names",
    "--anchor": "../verdict.md#against-an-anchor",
    "--dry-run": "inspect.md",
    "--fail-on": "../verdict.md#failing-a-script",
    "--initial-adapter": "../formats.md#starts-that-are-not-zero",
    "--layout": "../adapters.md#layouts",
    "--limit": "../verdict.md#thresholds",
    "--map-name": "../formats.md#names",
    "--max-memory": "../numerics.md#memory",
    "trajectory --metrics": "../trajectories.md#a-metric-beside-the-weights",
    "--ray": "../scale.md#a-ray-cluster",
    "--quick": "../numerics.md#methods-and-bounds",
    "--resume": "cache.md",
    "--spectra": "../trajectories.md#spectra-by-step",
    "--scalar-r2": "../trajectories.md#two-things-are-called-rank-1",
    "convert-adapter --force": "../methods-notes.md#the-base-inside-the-update",
    "extrapolate --force": "../verdict.md#too-far-from-the-base",
    "extrapolate --method": "../trajectories.md#extrapolators",
    "init-adapter --method": "../adapters.md#initialisations",
    "init-adapter --json": "../report.md#init-adapter",
    "init-adapter --report": "../report.md#init-adapter",
    "lineage --json": "../report.md#lineage",
    "trajectory --json": "../report.md#trajectory",
    **{
        f"{command} --json": "../report.md"
        for command in ("alignment", "anisotropy", "capacity", "collapse", "compare", "show")
    },
}


def with_table(page: Path, text: str) -> str:
    """The text of a command's page with its table of options as the command has them."""
    command: Any = get_command(app).commands[page.stem]  # pyright: ignore[reportAttributeAccessIssue]
    options = [each for each in command.params if each.param_type_name == "option"]
    rows = [_row(page.stem, option) for option in options if option.name != "help"]
    tables = _TABLE.findall(text)
    assert len(tables) == bool(rows), f"{page.name}: {len(tables)} tables of options"
    return _TABLE.sub(lambda _: HEAD + "".join(rows), text)


def _row(command: str, option: Any) -> str:
    name, *others = (*option.opts, *option.secondary_opts)
    metavar = f" {option.metavar}" if option.metavar else ""
    cell = f"`{name}{metavar}`".replace("|", "\\|")
    place = MORE.get(f"{command} {name}") or MORE.get(name)
    cell = f"[{cell}]({place})" if place else cell
    cell = ", ".join([cell, *(f"`{other}`" for other in others)])
    return f"| {cell} | {_default(option)} | {_meaning(option.help)} |\n"


def _default(option: Any) -> str:
    """What holds without the option; the words of the help where they tell it."""
    if option.required:
        return "required"
    if told := _DEFAULT.search(option.help):
        return _code(told[1])
    if option.is_flag:
        return "on" if option.default else "off"
    return "" if option.default in (None, (), []) else f"`{option.default}`"


def _meaning(text: str) -> str:
    return _code(_DEFAULT.sub("", text).replace("|", "\\|"))


def _code(text: str) -> str:
    """Options, files and codes in the text set as code."""
    return _CODE.sub(r"`\1`", text)
