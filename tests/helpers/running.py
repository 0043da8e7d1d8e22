"""Runs the command line in this process, as the console script does, and makes tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from geoscope.__main__ import main
from geoscope.records import Report, encode
from tests.helpers.forked import GEOSCOPE, run_forked
from tests.helpers.matrices import gaussian, save_model, updated

__all__ = ["Done", "by_rows", "process", "run", "weights", "write_pair"]

Weights = dict[str, Tensor]
TABLES = ("layers", "vectors", "overlaps")
SHAPES = {"self_attn.q_proj": (24, 24), "mlp.down_proj": (24, 40)}


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """The document, its matrices row by row."""
        return by_rows(json.loads(self.out))

    def layer(self, name: str) -> dict[str, Any]:
        (found,) = [one for one in self.report["layers"] if one["name"] == name]
        return found


def by_rows(document: dict[str, Any]) -> dict[str, Any]:
    """A report's document with a list of objects where it has a table."""
    if not str(document.get("schema")).startswith("geoscope.report/"):
        return document
    report = Report.from_json(document)
    rows = {name: [encode(row) for row in getattr(report, name)] for name in TABLES}
    return document | {name: rows[name] for name in TABLES if name in document}


def run(*arguments: str | Path) -> Done:
    """One command, through the error boundary; neither stream is a terminal."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["geoscope", *map(str, arguments)]),
            mock.patch.dict(os.environ),  # main() sets what BLAS reads
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(code, out.getvalue(), err.getvalue())


def process(*arguments: str | Path, encoding: str = "utf-8", **environment: str) -> Done:
    """The same in a process of its own, with files for streams, which are in `encoding`."""
    done = run_forked(
        GEOSCOPE,
        ["geoscope", *map(str, arguments)],
        env={**os.environ, **environment, "PYTHONIOENCODING": encoding},
        cwd=Path.cwd(),
    )
    return Done(done.returncode, done.stdout, done.stderr)


def weights(seed: int | None = None, *, rho: float = 0.02, layers: int = 2) -> Weights:
    """A tiny decoder in fp32: the base, or with a seed an isotropic update of it."""
    found: Weights = {}
    for layer in range(layers):
        for i, (module, (m, n)) in enumerate(SHAPES.items()):
            base = gaussian(m, n, seed=10 * layer + i)
            noise = gaussian(m, n, seed=10 * layer + i + (seed or 0))
            weight = base if seed is None else updated(base, noise, rho)
            found[f"model.layers.{layer}.{module}.weight"] = weight.float()
        found[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(24)
    found["model.embed_tokens.weight"] = gaussian(50, 24, seed=97).float()
    found["model.norm.weight"] = torch.ones(24)
    return found


def write_pair(
    root: Path,
    change: Callable[[Weights], None] | None = None,
    *,
    names: Sequence[str] = ("base", "tuned"),
) -> tuple[Path, Path]:
    """Two checkpoints under `root`; `change` is made to the tuned one before it is written."""
    tuned = weights(100)
    if change is not None:
        change(tuned)
    return save_model(root / names[0], weights()), save_model(root / names[1], tuned)
