"""Each command that writes or caches is killed at random moments, and run again.

A killed run may leave nothing that loads but what a whole run writes, and no part of a file under
its own name. The rerun, with --force, gives the bytes of a run that was never killed. Caches stay,
as they do for users. Prints Markdown.

    python benchmarks/kill_and_rerun.py [--seconds 180] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from synthetic import update, weight

# What a command writes: words, in which {} is the folder of the inputs and {out} that of outputs.
COMMANDS = {
    "compare": "compare {}/base {}/run/checkpoint-30 -o {out}/report.json",
    "trajectory": "trajectory {}/run --base {}/base -o {out}/report.json "
    "--vectors {out}/pairs.safetensors",
    "extrapolate": "extrapolate {}/run --base {}/base --to-step 40 --method linear -o {out}/model",
    "init-adapter": "init-adapter {}/base -r 4 -o {out}/start",
    "convert-adapter": "convert-adapter {}/start {}/start -o {out}/plain",
}
SHAPES = {"self_attn.q_proj": (256, 256), "mlp.down_proj": (256, 512)}
LAYERS, STEPS = 6, (10, 20, 30)


def models(root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    weights = {name: weight(*shape, generator) for name, shape in names.items()}
    save(root / "base", weights)
    for step in STEPS:
        for name, (m, n) in names.items():
            size = 1e-3 * float(weights[name].norm())
            weights[name] = weights[name] + update(m, n, size, generator)
        save(root / "run" / f"checkpoint-{step}", weights)


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    tensors = {name: W.bfloat16().contiguous() for name, W in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def words(command: str, root: Path, out: Path) -> list[str]:
    filled = [word.format(root, out=out) for word in COMMANDS[command].split()]
    return [sys.executable, "-m", "geoscope", *filled, "--force", "-q"]


def start(command: str, root: Path, out: Path) -> subprocess.Popen[bytes]:
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "GEOSCOPE_CACHE": str(root / "cache")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(words(command, root, out), env=environment, **quiet)


def whole(command: str, root: Path, out: Path) -> float:
    """Runs to the end; its seconds."""
    started = time.perf_counter()
    process = start(command, root, out)
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"{command}: status {process.returncode}: {said.decode()}")
    return time.perf_counter() - started


def content(out: Path) -> dict[str, object]:
    """Bytes of every file; of reports without their seconds. Locks and parts of files are none."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        found[path.relative_to(out).as_posix()] = path.read_bytes()
        if path.name == "report.json":
            report = json.loads(path.read_text())
            report["provenance"].pop("seconds")
            found[path.relative_to(out).as_posix()] = report
    return found


def left(out: Path, truth: dict[str, object]) -> str | None:
    """What a killed run must not leave: half a file, or a folder that loads and is not whole."""
    for path in out.rglob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except SafetensorError as error:
            return f"{path.name} is half: {error}"
    for path in out.rglob("*config.json"):
        folder = path.parent.relative_to(out).as_posix()
        here, wanted = content(out), {n for n in truth if n.startswith(f"{folder}/")}
        if any(name not in here for name in wanted if name.count("/") == folder.count("/") + 1):
            return f"{path} loads, and its folder is not whole"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, faults = random.Random(given.seed), list[str]()
    kills: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder), Path(folder) / "out"
        models(root)
        whole("init-adapter", root, root)  # what convert-adapter reads
        truth: dict[str, dict[str, object]] = {}
        seconds: dict[str, float] = {}
        for command in COMMANDS:
            shutil.rmtree(root / "cache", ignore_errors=True)
            seconds[command] = whole(command, root, out)
            truth[command] = content(out)
            shutil.rmtree(out)
        started, number = time.perf_counter(), 0
        while time.perf_counter() - started < given.seconds:
            command = list(COMMANDS)[number % len(COMMANDS)]
            number += 1
            if rng.random() < 0.5:
                shutil.rmtree(root / "cache", ignore_errors=True)
            process = start(command, root, out)
            try:
                process.communicate(timeout=rng.uniform(0.1, 1.05) * seconds[command])
                ended[command] += 1
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills[command] += 1
            fault = left(out, truth[command])
            whole(command, root, out)
            if fault is None and content(out) != truth[command]:
                fault = "the rerun gave other bytes"
            faults += [] if fault is None else [f"{command}: {fault}"]
            shutil.rmtree(out)
    print("| command | killed | had ended before |\n|---|--:|--:|")
    for command in COMMANDS:
        print(f"| {command} | {kills[command]} | {ended[command]} |")
    print(f"\n{sum(kills.values())} kills, {len(faults)} faults.")
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
