"""What the peers share: weights of a folder, a model of plain linear modules, the line they print.

Depends on torch and safetensors alone: it runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

__all__ = ["linear_model", "report", "weights"]


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every 2-D weight of a folder of safetensors shards."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                weight = handle.get_tensor(name)
                if weight.ndim == 2:
                    yield name, weight


def linear_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The weights of a folder as nn.Linear modules without bias, nested as their names say."""
    root = nn.Module()
    for name, weight in weights(folder):
        *path, leaf = name.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        parent.add_module(leaf, linear)
    return root


def report(
    package: str,
    variants: dict[str, Callable[[Path, Path], float]],
    *,
    computes: str,
    omits: str,
    counted: Sequence[str] = (),
) -> None:
    """Times the variants on the folders of the command line; prints the one line of JSON.

    A variant returns the seconds that it spent on preparing its input; they are taken off.
    `seconds` is the sum over `counted`, by default the first variant. What the package prints goes
    to standard error.
    """
    parser = argparse.ArgumentParser(description=f"{package}: {computes}")
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    given = parser.parse_args()
    found: dict[str, float | None] = {}
    failed = None
    with contextlib.redirect_stdout(sys.stderr):
        for name, variant in variants.items():
            try:
                started = time.perf_counter()
                prepared = variant(given.base.resolve(), given.tuned.resolve())
                found[name] = time.perf_counter() - started - prepared
            except Exception as error:
                found[name] = None
                failed = f"{name}: {type(error).__name__}: {error}"
    parts = [found[name] for name in counted or list(variants)[:1]]
    line: dict[str, Any] = {
        "name": package,
        "version": importlib.metadata.version(package),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": None if None in parts else sum(part for part in parts if part is not None),
        "variants": found,
        "computes": computes,
        "omits": omits,
    }
    print(json.dumps(line | ({"failed": failed} if failed else {})))
