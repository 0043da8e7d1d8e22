"""The options, each written once and shared by the commands that take it.

A command names what it takes; `with_options` gives it the signature that typer reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "COMPUTE",
    "CURVES",
    "DIMENSIONS",
    "FAIL_ON",
    "MAP_NAME",
    "MASKS",
    "OUTPUT",
    "PAIRING",
    "QUICK",
    "SELECT",
    "VERDICT",
    "Spec",
    "with_options",
]


@dataclass(frozen=True)
class Spec:
    """One option. metavar: what its value is called in the help; a switch has none."""

    kind: Any
    default: Any
    names: tuple[str, ...]
    help: str
    metavar: str | None = None


SELECT: dict[str, Spec] = {
    "include": Spec(
        list[str] | None,
        None,
        ("--include", "-i"),
        "Only tensors whose name matches this regular expression (re.search); replaces the "
        "default scope. May be given again.",
        "REGEX",
    ),
    "exclude": Spec(
        list[str] | None,
        None,
        ("--exclude", "-e"),
        "Leave out tensors whose name matches this regular expression. May be given again.",
        "REGEX",
    ),
    "layers": Spec(
        str | None, None, ("--layers",), "Only these block indices, such as 0-3,7.", "LIST"
    ),
}

MAP_NAME: dict[str, Spec] = {
    "map_name": Spec(
        list[str] | None,
        None,
        ("--map-name",),
        "Replace REGEX by REPL in the names of all models before they are matched (re.sub). May be "
        "given again.",
        "REGEX=REPL",
    ),
}

PAIRING: dict[str, Spec] = {
    **MAP_NAME,
    "allow_vocab_resize": Spec(
        bool,
        False,
        ("--allow-vocab-resize",),
        "Compare the rows that both have of embeddings and output heads of different height; "
        "--include brings these in scope.",
    ),
}

ADAPTER: dict[str, Spec] = {
    "initial_adapter": Spec(
        str | None,
        None,
        ("--initial-adapter",),
        "The adapter before training, where it did not start at zero (PiSSA, GeoRA, OLoRA …).",
        "DIR",
    ),
    "lora_alpha": Spec(
        float | None,
        None,
        ("--lora-alpha",),
        "Take this for lora_alpha of adapters; some converters write 0.",
        "X",
    ),
}

BUDGET: dict[str, Spec] = {
    "budget": Spec(
        str | None,
        None,
        ("--budget",),
        "Also the ranks that hold most of the update within so many parameters of an adapter, "
        "such as 20M.",
        "N",
    ),
}

NO_BASE: dict[str, Spec] = {
    "no_base": Spec(
        bool,
        False,
        ("--no-base",),
        "One argument, an adapter: what its factors tell without the base.",
    ),
}

DIMENSIONS: dict[str, Spec] = {
    "k": Spec(str, "8,64", ("--k",), "Subspace dimensions of the @k columns.", "K,K,…"),
}

COMPUTE: dict[str, Spec] = {
    "device": Spec(str, "auto", ("--device",), "auto, cpu, cuda (all), cuda:N or mps.", "NAME"),
    "dtype": Spec(
        str, "float64", ("--dtype",), "Precision of the spectra: float64 or float32.", "NAME"
    ),
    "solver": Spec(
        str,
        "auto",
        ("--solver",),
        "auto: the fastest method whose error bound is met; exact: LAPACK's SVD throughout.",
        "NAME",
    ),
    "max_memory": Spec(
        str | None,
        None,
        ("--max-memory",),
        "Memory bound, such as 8GB, or min; default what all workers need, half the free at most.",
        "SIZE",
    ),
    "jobs": Spec(
        int | None, None, ("--jobs", "-j"), "Worker threads on the CPU; default one a core.", "N"
    ),
    "seed": Spec(int, 0, ("--seed",), "Seed of the sampled nulls.", "N"),
    "resume": Spec(
        bool,
        True,
        ("--resume/--no-resume",),
        "Use and keep the result of each matrix (geoscope cache), so that a rerun continues.",
    ),
}

OUTPUT: dict[str, Spec] = {
    "as_json": Spec(bool, False, ("--json",), "One JSON document on standard output."),
    "out": Spec(
        list[Path] | None,
        None,
        ("--out", "-o"),
        "Also write FILE.{json,csv,md,png,svg,pdf}; the suffix decides. May be given again.",
        "FILE",
    ),
    "force": Spec(bool, False, ("--force",), "Overwrite existing files."),
    "strict": Spec(bool, False, ("--strict",), "Exit 1 when a matrix in scope was not compared."),
    "dry_run": Spec(
        bool,
        False,
        ("--dry-run",),
        "Show what would be read and computed, from headers alone; compute and write nothing.",
    ),
    "quiet": Spec(
        bool,
        False,
        ("--quiet", "-q"),
        "Nothing on standard error but errors and what explains the exit code.",
    ),
    "verbose": Spec(
        bool, False, ("--verbose", "-v"), "List every matrix, and how it was computed."
    ),
    "debug": Spec(bool, False, ("--debug",), "Show the traceback of an error."),
}

FAIL_ON: dict[str, Spec] = {
    "fail_on": Spec(
        str | None,
        None,
        ("--fail-on",),
        "Exit 3 when any of EXPR[,EXPR…] holds: CODE, CODE>SHARE, ID>NUMBER or ID<NUMBER.",
        "EXPR",
    ),
}

VERDICT: dict[str, Spec] = {
    "explain": Spec(bool, False, ("--explain",), "Show every threshold and the values it met."),
    "limit": Spec(
        list[str] | None,
        None,
        ("--limit",),
        "Another limit for a threshold of the verdict, by the name that --explain prints; an "
        "angle in radians, or as 15deg. May be given again.",
        "NAME=VALUE",
    ),
    "anchor": Spec(
        str | None,
        None,
        ("--anchor",),
        "Another tuned model of the same base: show every number as a ratio to its number.",
        "MODEL",
    ),
}

MASKS: dict[str, Spec] = {
    "masks": Spec(bool, False, ("--masks",), "Also the overlap of changed weights with masks."),
}

QUICK: dict[str, Spec] = {
    "quick": Spec(
        bool,
        False,
        ("--quick",),
        "Leading directions only, angles to 1e-5 rad; full-spectrum numbers are left out. Slower "
        "than doing without where spectra are flat.",
    ),
}

CURVES: dict[str, Spec] = {
    "curves": Spec(
        bool,
        False,
        ("--curves",),
        "Captured energy over the base's whole basis: in the figure, and as numbers in "
        "alignment and compare (slower).",
    ),
}


def with_options(*groups: dict[str, Spec]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command that ends in `**options` the options of these groups, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=one.default,
                annotation=Annotated[
                    one.kind, typer.Option(*one.names, help=one.help, metavar=one.metavar)
                ],
            )
            for group in groups
            for name, one in group.items()
        ]
        every = [*own, *added]
        command.__signature__ = inspect.Signature(every)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {one.name: one.annotation for one in every}
        return command

    return decorate
