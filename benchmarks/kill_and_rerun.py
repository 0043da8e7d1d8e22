"""Each command that writes or caches is killed at random moments, and run again.

A killed run may leave nothing that loads but what a whole run writes, and no part of a file under
its own name. The rerun, with --force, gives the bytes of a run that was never killed. Caches stay,
as they do for users. Each command is a fork of one process that has imported what is slow, so that
the moments fall into the work and not into imports. Prints Markdown; with --log also on the way.

    python benchmarks/kill_and_rerun.py [--kills 50] [--seconds 600] [--seed 0] [--log FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
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
    "lineage": "lineage {}/run/checkpoint-30 {}/base {}/run/checkpoint-10 -o {out}/report.json",
    "show": "show {}/report.json -o {out}/page.html -o {out}/table.csv -o {out}/figure.svg",
}
SLOW = (
    "geoscope.cli", "geoscope.report.text", "geoscope.verbs.adapters.convert", "rich.table",
    "geoscope.verbs.adapters.initialise", "geoscope.verbs.lineage", "geoscope.verbs.pairs.compare",
    "geoscope.verbs.series.extrapolate", "geoscope.verbs.series.follow", "pydantic.type_adapter",
    "scipy.linalg", "scipy.special",
)  # fmt: skip
SHAPES = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}
LAYERS, STEPS = 3, (10, 20, 30)


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


def forked(work: Callable[[], object], errors: Path) -> int:
    """Starts the work in a fork; its process id. errors: where its standard error goes."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    code: object = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def start(command: str, root: Path, out: Path) -> int:
    """Starts a command; its process id."""
    from geoscope.__main__ import main

    out.mkdir(exist_ok=True)
    filled = [word.format(root, out=out) for word in COMMANDS[command].split()]

    def work() -> None:
        os.environ["GEOSCOPE_CACHE"] = str(root / "cache")
        sys.argv = ["geoscope", *filled, "--force", "-q"]
        main()

    return forked(work, root / "errors")


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole(command: str, root: Path, out: Path) -> float:
    """Runs to the end; its seconds."""
    started = time.perf_counter()
    code = ended(start(command, root, out))
    if code:
        sys.exit(f"{command}: status {code}: {(root / 'errors').read_text()}")
    return time.perf_counter() - started


def killed(command: str, root: Path, out: Path, seconds: float) -> bool:
    """Runs for so long; whether it had not ended."""
    pid = start(command, root, out)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


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


@dataclass
class Counts:
    """kills, early: of each command, those that met it at work, and those that came too late."""

    kills: Counter[str] = field(default_factory=Counter[str])
    early: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])

    def told(self, seconds: float) -> str:
        lines = ["| command | killed | had ended before |", "|---|--:|--:|"]
        lines += [f"| {name} | {self.kills[name]} | {self.early[name]} |" for name in COMMANDS]
        told = f"{self.kills.total()} kills in {seconds:.0f} s, {len(self.faults)} faults."
        return "\n".join([*lines, "", told, *self.faults])


def trial(
    command: str, root: Path, out: Path, truth: dict[str, object], seconds: float, counts: Counts
) -> None:
    """One kill and one rerun."""
    was_killed = killed(command, root, out, seconds)
    (counts.kills if was_killed else counts.early)[command] += 1
    fault = left(out, truth)
    whole(command, root, out)
    if fault is None and content(out) != truth:
        fault = "the rerun gave other bytes"
    if fault is not None:
        counts.faults.append(f"{command}, after {seconds:.3f} s: {fault}")
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seconds", type=float, default=600, help="no new one after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for module in SLOW:
        importlib.import_module(module)
    rng, counts = random.Random(given.seed), Counts()
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder), Path(folder) / "out"
        ended(forked(lambda: models(root), root / "errors"))  # no thread before a fork
        whole("init-adapter", root, root)  # what convert-adapter reads
        whole("compare", root, out)
        shutil.move(out / "report.json", root / "report.json")  # what show reads
        truth: dict[str, dict[str, object]] = {}
        seconds: dict[str, float] = {}
        for command in COMMANDS:
            shutil.rmtree(root / "cache", ignore_errors=True)
            seconds[command] = whole(command, root, out)
            truth[command] = content(out)
            shutil.rmtree(out)
        started = time.perf_counter()
        for _ in range(given.kills):
            for command in COMMANDS:
                if time.perf_counter() - started > given.seconds:
                    break
                if rng.random() < 0.5:
                    shutil.rmtree(root / "cache", ignore_errors=True)
                moment = rng.uniform(0, 1.05) * seconds[command]
                trial(command, root, out, truth[command], moment, counts)
                if given.log is not None:
                    given.log.write_text(counts.told(time.perf_counter() - started) + "\n")
    print(counts.told(time.perf_counter() - started))
    sys.exit(bool(counts.faults))


if __name__ == "__main__":
    main()
