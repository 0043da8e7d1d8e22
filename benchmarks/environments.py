"""The peers' virtual environments: one each, with the torch that runs here and no other.

A constraint pins torch, so that no package can pull another build of it (of gigabytes). Where the
package index serves CUDA builds only, point pip at one with CPU builds first (README.md).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

__all__ = ["PEERS", "make"]

# module of benchmarks/peers → what pip installs for it
PEERS: dict[str, tuple[str, ...]] = {
    "modeldelta": ("modeldelta==0.4.4",),
    "weightwatcher": ("weightwatcher==0.7.7", "safetensors"),
    "mergekit_extract": ("mergekit==0.1.5",),
    "peft_pissa": ("peft==0.21.2",),
}


def make(folder: Path) -> None:
    """Makes the environments that are absent; what cannot be installed is said and left out."""
    for name, packages in PEERS.items():
        place = folder / name
        if (place / "bin" / "python").exists():
            continue
        print(f"making the environment of {name}", file=sys.stderr)
        venv.create(place, with_pip=True)
        if not _install(place, packages):
            print(f"{name} could not be installed; its line will say so", file=sys.stderr)


def _install(place: Path, packages: tuple[str, ...]) -> bool:
    """torch first and alone, then the packages under its constraint."""
    pinned = f"torch=={torch.__version__.split('+')[0]}"
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        constraint = Path(scratch) / "constraints.txt"
        constraint.write_text(pinned + "\n", encoding="utf-8")
        for wanted in ((pinned,), packages):
            if subprocess.run([*pip, "--constraint", str(constraint), *wanted]).returncode:
                return False
    return True
