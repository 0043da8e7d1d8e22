"""The other commands on CUDA and on the CPU: seconds of each, in this process; Markdown.

Adapters, capacity, initial adapters, several tuned models, NExt's networks, and many experts with
1, 4 and 16 threads. Whether their numbers agree is what the tests marked `gpu` tell.

    python benchmarks/gpu_commands.py [--device cuda] [--layers 2] [--only REGEX] [--no-cpu]
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import synthetic
import torch
from adapter import make as make_adapter
from machine import set_aside_variables
from safetensors.torch import load_file, save_file

import geoscope
from geoscope.verbs.options import Options

Work = Callable[[str], Any]


def works(root: Path, family: str, layers: int, rank: int) -> Iterator[tuple[str, Work]]:
    """What is timed: a name, and the call for a device."""
    pair, series, moe, lora = (root / name for name in ("pair", "series", "moe", "lora"))
    synthetic.write(pair, family, layers)
    base, tuned = str(pair / "base"), str(pair / "tuned")
    make_adapter(lora, layers, synthetic.FAMILIES[family], rank)

    def options(device: str, **more: Any) -> Options:
        return Options(device=device, cache=None, **more)

    yield (
        f"`compare` with a LoRA, r = {rank}",
        lambda device: geoscope.compare(base, str(lora), options=options(device)),
    )
    yield (
        f"`capacity` of a LoRA without its base, r = {rank}",
        lambda device: geoscope.capacity(str(lora), options=options(device)),
    )
    yield (
        "`capacity` of a pair",
        lambda device: geoscope.capacity(base, tuned, options=options(device)),
    )
    other = str(pair / "base")
    yield (
        "`compare` of two tuned models, with overlaps",
        lambda device: geoscope.compare(base, tuned, other, options=options(device)),
    )
    for method in ("geora", "pissa"):
        yield (
            f"`init-adapter --method {method}`, r = {rank}",
            lambda device, method=method: geoscope.init_adapter(
                base, method=method, rank=rank, device=device, cache=None
            ),
        )
    paths = _series(series)
    yield (
        "`extrapolate --method next`, 4 matrices of 576×576, 6 steps, 200 of training",
        lambda device: geoscope.extrapolate(
            paths, 12, method="next", force=True, training=200, device=device, cache=None
        ),
    )
    synthetic.write(moe, "small-experts" if family == "small" else "qwen3-30b-a3b", 2)
    experts = (str(moe / "base"), str(moe / "tuned"))
    for jobs in (1, 4, 16):
        yield (
            f"`compare` of two layers of experts, -j {jobs}",
            lambda device, jobs=jobs: geoscope.compare(
                *experts, options=options(device, jobs=jobs)
            ),
        )


def _series(root: Path) -> list[str]:
    """Four matrices that move along a line, with noise."""
    made = torch.Generator().manual_seed(0)
    start = [0.02 * torch.randn(576, 576, generator=made) for _ in range(4)]
    way = [torch.randn(576, 2, generator=made) @ torch.randn(2, 576, generator=made) for _ in start]
    paths = []
    for step in range(7):
        folder = root / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        weights = {
            f"model.layers.{i}.self_attn.q_proj.weight": W
            + 1e-4 * step * D
            + 1e-5 * torch.randn(576, 576, generator=made)
            for i, (W, D) in enumerate(zip(start, way, strict=True))
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "llama"}')
        paths.append(str(folder))
    assert len(load_file(folder / "model.safetensors")) == len(start)
    return paths


def seconds(work: Work, device: str) -> float:
    started = time.perf_counter()
    work(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", default="", help="lines that match this regular expression")
    parser.add_argument("--no-cpu", action="store_true", help="leave the CPU's times out")
    parser.add_argument("--small", action="store_true", help="small shapes")
    given = parser.parse_args()
    set_aside_variables()
    family, rank = ("small", 8) if given.small else ("qwen2.5-1.5b", 32)
    print(f"| | {given.device}, first | {given.device}, again | cpu | cpu/again |")
    print("|---|--:|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(Path(folder), family, given.layers, rank):
            if re.search(given.only, name):
                try:
                    first, again = seconds(work, given.device), seconds(work, given.device)
                    here = None if given.no_cpu else seconds(work, "cpu")
                except (geoscope.GeoscopeError, RuntimeError) as error:
                    print(f"| {name} | failed: {error} | | | |", flush=True)
                    continue
                row = f"{first:.3g} | {again:.3g} | "
                row += " | " if here is None else f"{here:.3g} | {here / again:.2f}"
                print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
