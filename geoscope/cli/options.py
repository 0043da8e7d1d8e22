"""The options, each written once and shared by the commands that take it.

A command names what it takes; `with_options` gives it the signature that typer reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["COMPUTE", "OUTPUT", "SELECT", "with_options"]

# name → (type, default, declarations, help)
_Spec = tuple[Any, Any, tuple[str, ...], str]

SELECT: dict[str, _Spec] = {
    "include": (
        list[str] | None,
        None,
        ("--include", "-i"),
        "Only tensors whose name matches this regular expression (re.search); replaces the "
        "default scope. May be given again.",
    ),
    "exclude": (
        list[str] | None,
        None,
        ("--exclude", "-e"),
        "Leave out tensors whose name matches this regular expression. May be given again.",
    ),
    "layers": (str | None, None, ("--layers",), "Only these block indices, such as 0-3,7."),
}

COMPUTE: dict[str, _Spec] = {
    "k": (str, "8,64", ("--k",), "Subspace dimensions of the @k columns."),
    "device": (str, "auto", ("--device",), "auto, cpu, cuda, cuda:N or mps."),
    "dtype": (str, "float64", ("--dtype",), "Precision of the spectra: float64 or float32."),
    "solver": (
        str,
        "auto",
        ("--solver",),
        "auto: the fastest method whose error bound is met; exact: LAPACK's SVD throughout.",
    ),
    "max_memory": (
        str | None,
        None,
        ("--max-memory",),
        "Memory bound, such as 8GB; default 4 × the largest pair in fp32, plus 500 MB.",
    ),
    "jobs": (int | None, None, ("--jobs", "-j"), "Worker threads on the CPU; default one a core."),
    "seed": (int, 0, ("--seed",), "Seed of the sampled nulls."),
    "resume": (
        bool,
        True,
        ("--resume/--no-resume",),
        "Use and keep the result of each matrix (geoscope cache), so that a rerun continues.",
    ),
}

OUTPUT: dict[str, _Spec] = {
    "as_json": (bool, False, ("--json",), "One JSON document on standard output."),
    "out": (
        list[Path] | None,
        None,
        ("--out", "-o"),
        "Also write FILE.{json,csv,md,png,svg,pdf}; the suffix decides. May be given again.",
    ),
    "force": (bool, False, ("--force",), "Overwrite existing files."),
    "strict": (bool, False, ("--strict",), "Exit 1 when a matrix in scope was not compared."),
    "dry_run": (
        bool,
        False,
        ("--dry-run",),
        "Show what would be read and computed, from headers alone; compute and write nothing.",
    ),
    "quiet": (bool, False, ("--quiet", "-q"), "Nothing on standard error but errors."),
    "verbose": (bool, False, ("--verbose", "-v"), "List every matrix, and how it was computed."),
    "debug": (bool, False, ("--debug",), "Show the traceback of an error."),
}

FAIL_ON: dict[str, _Spec] = {
    "fail_on": (
        str | None,
        None,
        ("--fail-on",),
        "Exit 3 when any of EXPR[,EXPR…] holds: CODE, CODE>SHARE, ID>NUMBER or ID<NUMBER.",
    ),
}

VERDICT: dict[str, _Spec] = {
    "explain": (bool, False, ("--explain",), "Show every threshold and the values it met."),
    "anchor": (
        str | None,
        None,
        ("--anchor",),
        "Another tuned model of the same base: show every number as a ratio to its number.",
    ),
}

MASKS: dict[str, _Spec] = {
    "masks": (bool, False, ("--masks",), "Also the overlap of changed weights with masks."),
}

QUICK: dict[str, _Spec] = {
    "quick": (
        bool,
        False,
        ("--quick",),
        "Leading directions only: minutes become seconds, full-spectrum numbers are left out.",
    ),
}

CURVES: dict[str, _Spec] = {
    "curves": (
        bool,
        False,
        ("--curves",),
        "Captured energy over the base's whole basis (slower).",
    ),
}


def with_options(*groups: dict[str, _Spec]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
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
                default=default,
                annotation=Annotated[kind, typer.Option(*names, help=text)],
            )
            for group in groups
            for name, (kind, default, names, text) in group.items()
        ]
        every = [*own, *added]
        command.__signature__ = inspect.Signature(every)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {one.name: one.annotation for one in every}
        return command

    return decorate
