"""A series of checkpoints: what following it costs beside the obvious ways. Prints Markdown.

Every line is measured in every round, one after the other, on the same files, which lie in the page
cache; the minimum of the rounds is shown, as others may work on the machine. Full SVDs as NExt
takes them, `torch.linalg.svd` in fp32 of Δ and δ of every tensor and step, are taken in the first
`--svd-rounds` only, and of the first `--svd-steps` checkpoints.

    python benchmarks/trajectory.py [--family llama-3-8b] [--rounds 3] [--steps 12]
        [--svd-steps 3] [--decay 0.5]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic import FAMILIES, weight
from torch import Tensor

from geoscope.verbs.options import Progress
from geoscope.verbs.series.follow import follow, measure_series
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.report import Trajectory
from geoscope.verbs.series.tensors import MatchedSeries

# Matrices of one layer that are followed, by family, and drift of size RHO·‖W_0‖ a step. Two of
# each shape, so that two workers are busy, as they are on a whole model. Full SVDs of the MLP of an
# 8B model would take an hour.
LEAVES = {
    "qwen2.5-1.5b": ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"),
    "llama-3-8b": ("self_attn.q_proj", "self_attn.o_proj"),
}
RHO = 1e-3
# Rank of the drift, half of its energy; the rest is dense.
DRIFT_RANK = 16
# The adapters: rank 32 in all matrices of the 8B shapes, as a model of 32 layers has them.
RANK, ADAPTER_STEPS, DEPTH = 32, 15, 32


def make(root: Path, family: str, steps: int, layers: int, decay: float) -> None:
    """`root`/base and /run: bf16, a drift beside as much dense noise a step; /lora: fp32.

    The drift has DRIFT_RANK singular values ∝ i^-decay and a dense half; 0 makes them equal, which
    is the worst case for any search for the leading pair.
    """
    generator = torch.Generator().manual_seed(0)
    now, drift = {}, {}
    for leaf in LEAVES[family]:
        m, n = FAMILIES[family][leaf]
        W = weight(m, n, generator)
        now[leaf] = W.bfloat16().float()
        drift[leaf] = _drift(m, n, RHO * float(W.norm()), decay, generator)
    _save(root / "base", now)
    for step in range(1, steps + 1):
        for leaf, W in now.items():
            noise = torch.randn(W.shape, generator=generator) * (
                drift[leaf].norm() / W.numel() ** 0.5
            )
            now[leaf] = W + drift[leaf] + noise
        _save(root / f"run/checkpoint-{10 * step}", now)
    _make_adapters(root / "lora", layers, generator)


def _drift(m: int, n: int, size: float, decay: float, generator: torch.Generator) -> Tensor:
    U, V = (torch.linalg.qr(torch.randn(k, DRIFT_RANK, generator=generator)).Q for k in (m, n))
    low = (U * torch.arange(1, DRIFT_RANK + 1) ** -decay) @ V.T
    dense = torch.randn(m, n, generator=generator)
    return size * (low / low.norm() + dense / dense.norm()) / 2**0.5


def _save(folder: Path, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {f"model.layers.0.{leaf}.weight": W.bfloat16() for leaf, W in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _make_adapters(root: Path, layers: int, generator: torch.Generator) -> None:
    modules = {
        f"model.layers.{layer}.{leaf}": shape
        for layer in range(layers)
        for leaf, shape in FAMILIES["llama-3-8b"].items()
    }
    targets = [leaf.rpartition(".")[2] for leaf in FAMILIES["llama-3-8b"]]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    now = {
        name: (torch.zeros(m, RANK), torch.randn(RANK, n, generator=generator) / n**0.5)
        for name, (m, n) in modules.items()
    }
    for step in range(1, ADAPTER_STEPS + 1):
        folder = root / f"checkpoint-{10 * step}"
        folder.mkdir(parents=True)
        for pair in now.values():
            for factor in pair:
                factor += 1e-3 * torch.randn(factor.shape, generator=generator)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        sides = {"B": 0, "A": 1}
        tensors = {
            f"base_model.model.{name}.lora_{side}.weight": pair[i]
            for name, pair in now.items()
            for side, i in sides.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors")


# --- what is compared ---------------------------------------------------------------------------


def opened(root: Path, steps: int) -> MatchedSeries:
    points = [str(root / f"run/checkpoint-{10 * i}") for i in range(1, steps + 1)]
    return open_followed(points, FollowOptions(base=str(root / "base")))


def measured(root: Path, steps: int, *, directions: bool) -> Trajectory:
    """Grams, and with `directions` the leading pairs of every Δ and δ, of the whole series."""
    options = FollowOptions(base=str(root / "base"), directions=directions)
    return measure_series(opened(root, steps), options, Progress())


def one_pass(root: Path, steps: int) -> float:
    """Read, upcast, subtract the checkpoint before, square, add up."""
    total = 0.0
    for _, series in _series(root, steps):
        before: Tensor | None = None
        for stored in series:
            W = stored.double()
            total += float((W if before is None else W - before).square().sum())
            before = W
    return total


def reading(root: Path, steps: int) -> int:
    """Every byte into memory of its own."""
    return sum(one.clone().numel() for _, series in _series(root, steps) for one in series)


def full_svds(root: Path, steps: int) -> dict[str, list[float]]:
    """σ1 of every Δ as NExt finds it: full fp32 SVDs of Δ and δ."""
    found: dict[str, list[float]] = {}
    for name, series in _series(root, steps):
        base = before = next(series).float()
        for stored in series:
            W = stored.float()
            S = torch.linalg.svd(W - base, full_matrices=False).S
            torch.linalg.svd(W - before, full_matrices=False)
            found.setdefault(name, []).append(float(S[0]))
            before = W
    return found


def truth(root: Path, steps: int) -> dict[str, list[float]]:
    """σ1 of every Δ from the eigenvalues of its fp64 Gram matrix."""
    found: dict[str, list[float]] = {}
    for name, series in _series(root, steps):
        base = next(series).double()
        for stored in series:
            D = stored.double() - base
            gram = D.T @ D if D.shape[0] > D.shape[1] else D @ D.T
            found.setdefault(name, []).append(float(torch.linalg.eigvalsh(gram)[-1].sqrt()))
    return found


def _series(root: Path, steps: int) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Each tensor and it at every step, the base first."""
    places = [root / "base", *(root / f"run/checkpoint-{10 * i}" for i in range(1, steps + 1))]
    files = [safe_open(place / "model.safetensors", "pt") for place in places]
    for name in sorted(files[0].keys()):
        yield name, (file.get_tensor(name) for file in files)


def worst(found: dict[str, list[float]], true: dict[str, list[float]]) -> float:
    """Largest relative error of σ1."""
    pairs = [(a, b) for name in true for a, b in zip(found[name], true[name], strict=True)]
    return max(abs(a - b) / b for a, b in pairs)


def adapters(root: Path) -> None:
    follow([str(root / "lora")], options=FollowOptions())


# --- measuring ----------------------------------------------------------------------------------


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak(*words: str) -> float:
    """Peak resident MB of a command."""
    command = [sys.executable, "-m", "geoscope", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"geoscope {words[0]} failed with status {child.returncode}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--svd-rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--svd-steps", type=int, default=3)
    parser.add_argument("--family", default="qwen2.5-1.5b", choices=sorted(LEAVES))
    parser.add_argument("--adapter-layers", type=int, default=2)
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.family, given.steps, given.adapter_layers, given.decay)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # In a process of its own: a child's peak counts what its parent held when it forked.
        own = [sys.executable, __file__, "--make", folder, "--steps", str(given.steps)]
        own += ["--family", given.family]
        own += ["--decay", str(given.decay), "--adapter-layers", str(given.adapter_layers)]
        subprocess.run(own, check=True)
        print(table(root, given))


def table(root: Path, given: argparse.Namespace) -> str:
    few, T = given.svd_steps, given.steps
    run = ["trajectory", str(root / "run"), "--base", str(root / "base"), "--json", "-q"]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    idle, whole, without = peak("--version"), peak(*run), peak(*run, "--no-directions")
    dense: dict[str, list[float]] = {}
    lines: dict[str, Callable[[], object]] = {
        "svd": lambda: dense.update(full_svds(root, few)),
        "pairs": lambda: measured(root, few, directions=True),
        "all": lambda: measured(root, T, directions=True),
        "gram": lambda: measured(root, T, directions=False),
        "pass": lambda: one_pass(root, T),
        "read": lambda: reading(root, T),
        "lora": lambda: adapters(root),
    }
    load = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(given.rounds):
        for name, action in lines.items():
            if name != "svd" or number < given.svd_rounds:
                seconds[name].append(timed(action))
    best = {name: min(found) for name, found in seconds.items()}
    true = truth(root, few)
    ours = {
        name: path.sigma.tolist()
        for name, path in measured(root, few, directions=True).paths.items()
    }
    sizes = [math.prod(FAMILIES[given.family][leaf]) for leaf in LEAVES[given.family]]
    entries, largest = sum(sizes), max(sizes)
    scale = DEPTH / given.adapter_layers

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    def spread(name: str) -> str:
        return f"{best[name]:.3g} ({max(seconds[name]):.3g})"

    return "\n".join(
        [
            f"{len(sizes)} matrices of {given.family} ({entries / 1e6:.1f} M weights, bf16, "
            f"synthetic, σ_i ∝ i^-{given.decay:g}), T = {T}; {os.cpu_count()} cores, shared with "
            f"other work (load average "
            f"{load:.1f} before, {os.getloadavg()[0]:.1f} after); least of {given.rounds} rounds "
            f"(most), of the full SVDs {given.svd_rounds}.",
            "",
            row("line", "seconds", "ratio", "σ1 error"),
            "|---|--:|--:|--:|",
            row(f"full fp32 SVDs of Δ and δ, T = {few}", spread("svd"), "1",
                f"{worst(dense, true):.1e}"),
            row(f"geoscope: leading pairs, Grams, files, T = {few}", spread("pairs"),
                f"{best['svd'] / best['pairs']:.0f} × faster", f"{worst(ours, true):.1e}"),
            row(f"the same, T = {T}", spread("all"), "", ""),
            row(f"reading alone, T = {T}", spread("read"), "", ""),
            row(f"reading and one pass of arithmetic, T = {T}", spread("pass"), "1", ""),
            row(f"geoscope: Gram pass, T = {T}", spread("gram"),
                f"{best['gram'] / best['pass']:.2f} ×", ""),
            row(f"rank-{RANK} adapters, {given.adapter_layers} layers of 8B shapes, "
                f"{ADAPTER_STEPS} steps, with report", spread("lora"),
                f"{best['lora'] * scale:.0f} s for {DEPTH} layers, scaled", ""),
            "",
            f"Peak memory of `geoscope trajectory`, T = {T}: {whole:.0f} MB, without directions "
            f"{without:.0f} MB; with nothing to do {idle:.0f} MB; the series is "
            f"{(T + 1) * entries * 2 / 1e6:.0f} MB, its largest tensor in fp64 "
            f"{largest * 8 / 1e6:.0f} MB (this process held {held:.0f} MB when they forked).",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
