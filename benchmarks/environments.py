"""The peers' virtual environments: one each, with the torch that runs here and no other.

A constraint pins torch, so that no package can pull another build of it (of gigabytes). Where the
package index serves CUDA builds only, point pip at one with CPU builds first (README.md).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

__all__ = ["PEERS", "make", "why_absent"]

# module of benchmarks/peers → what pip installs for it
PEERS: dict[str, tuple[str, ...]] = {
    "modeldelta": ("modeldelta==0.4.4",),
    "weightwatcher": ("weightwatcher==0.7.7", "safetensors"),
    "mergekit_extract": ("mergekit==0.1.5",),
    "peft_pissa": ("peft==0.21.2",),
}


def make(folder: Path) -> None:
    """Makes the environments that are absent; of what cannot be installed the reason is kept."""
    for name, packages in PEERS.items():
        place = folder / name
        if (place / "bin" / "python").exists():
            continue
        print(f"making the environment of {name}", file=sys.stderr)
        venv.create(place, with_pip=True)
        reason = _install(place, packages)
        if reason is not None:
            print(f"{name} could not be installed: {reason}", file=sys.stderr)
            shutil.rmtree(place)
            _note(folder, name).write_text(reason + "\n", encoding="utf-8")


def why_absent(folder: Path, name: str) -> str:
    """Why an environment is not there."""
    note = _note(folder, name)
    reason = note.read_text(encoding="utf-8").strip() if note.exists() else "see --make-peers"
    return f"not installed: {reason}"


def _note(folder: Path, name: str) -> Path:
    return folder / f"{name}.failed"


def _install(place: Path, packages: tuple[str, ...]) -> str | None:
    """torch first and alone, then the packages under its constraint; why not, or None."""
    pinned = f"torch=={torch.__version__.split('+')[0]}"
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        constraint = Path(scratch) / "constraints.txt"
        constraint.write_text(pinned + "\n", encoding="utf-8")
        for wanted in ((pinned,), packages):
            command = [*pip, "--constraint", str(constraint), *wanted]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                return errors[-1] if errors else f"pip ended with {done.returncode}"
    return None
