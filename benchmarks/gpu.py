"""Checks and times everything that runs on CUDA, in one call; Markdown on standard output.

1. Does CUDA give the CPU's numbers? Every metric, factorise in hard cases, leading triplets.
2. Stacks of a model's matrices, stage by stage, beside the device's peaks; their sum over a model.
3. The whole `compare` on synthetic checkpoints, CUDA and CPU, with the time of each stage.

Ends with 0 and the line "no CUDA device" where there is none, with 1 where numbers disagree.

    python benchmarks/gpu.py [--layers 28] [--out table.md]
    python benchmarks/gpu.py --device cpu --small
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import synthetic
import torch
from agreement import KS, Check, factorise_checks, leading_checks, metric_checks, of_values
from machine import child, facts, set_aside_variables
from stacks import UPDATE_PAIR, Peaks, Stage, peaks, stages

from geoscope.metrics import METRICS, Measured, instances
from geoscope.metrics.measure import verdict_dimension
from geoscope.records import LayerRecord, Report
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.compare import compare

HERE = Path(__file__).resolve().parent

# Data sheets: fp64 flops a second (tensor cores where there are any), bytes a second of memory.
_SHEETS = {
    "B200": (37e12, 7.7e12),
    "H200": (67e12, 4.8e12),
    "H100": (67e12, 3.35e12),
    "A100": (19.5e12, 2.04e12),
}


@dataclass(frozen=True)
class Timed:
    """A line of part 3."""

    label: str
    seconds: list[float]
    remark: str = ""


# --- part 3: whole comparisons ------------------------------------------------------------------


def whole(
    family: str, layers: int, device: torch.device, rounds: int
) -> tuple[list[Timed], dict[str, float], list[Check]]:
    """Times of the whole comparison, seconds by stage, and the agreement of its reports."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _say("writing checkpoints")
        synthetic.write(folder, family, layers)
        base, tuned = str(folder / "base"), str(folder / "tuned")
        _say("on the CPU")
        spent, reference = _once(base, tuned, Options(device="cpu", cache=None))
        lines = [Timed("cpu", [spent])]
        _say("in fresh processes")
        cold, seconds = _processes(base, tuned, device)
        lines += cold
        _say("in this process")
        options = Options(device=str(device), cache=None)
        warm = [_once(base, tuned, options) for _ in range(rounds + 1)]
        same = "identical when repeated" if _same(warm[0][1], warm[-1][1]) else "NOT identical"
        lines.append(Timed(f"{device}, warm process", [one for one, _ in warm[1:]], same))
        first = frozenset({0})
        alone = Options(device=str(device), max_memory="0", layers=first, cache=None)
        spent, one_by_one = _once(base, tuned, alone)
        lines.append(Timed(f"{device}, one pair a batch, first layer only", [spent]))
    checks = [
        *_agreement("whole compare", reference, warm[0][1]),
        *_agreement("whole compare, one pair a batch", warm[0][1], one_by_one),
    ]
    return lines, seconds, checks


def _processes(base: str, tuned: str, device: torch.device) -> tuple[list[Timed], dict[str, float]]:
    """Computing part in processes of their own, where CUDA starts cold; seconds by stage of one."""
    kinds = {
        f"{device}, cold process": (),
        f"{device}, cold process, --quick --k 8": ("--quick", "--k", "8"),
        f"{device}, cold process, --curves --masks": ("--curves", "--masks"),
        f"{device}, cold process, each kernel waited for": ("--stages",),
    }
    lines, seconds = [], {}
    for label, options in kinds.items():
        command = [sys.executable, str(HERE / "computing.py"), base, tuned]
        run = child([*command, "--device", str(device), *options], ours=True)
        if run.answer is None:
            lines.append(Timed(label, [], run.failure or "it printed no JSON"))
        else:
            lines.append(Timed(label, [run.answer["seconds"]]))
            seconds = run.answer.get("stages", seconds)
    return lines, seconds


def _once(base: str, tuned: str, options: Options) -> tuple[float, Report]:
    started = time.perf_counter()
    report = compare(base, tuned, options=options)
    return time.perf_counter() - started, report


def _same(a: Report, b: Report) -> bool:
    return a.layers == b.layers and a.summary == b.summary


def _agreement(group: str, ours: Report, theirs: Report) -> Iterator[Check]:
    """Every number of two reports on the matrices that both have."""
    common = {one.name for one in ours.layers} & {one.name for one in theirs.layers}
    both = ([one for one in side.layers if one.name in common] for side in (ours, theirs))
    for a, b in zip(*both, strict=True):
        ks = sorted({*KS, verdict_dimension((a.shape[0], a.shape[1]))})
        selected = [one for metric in METRICS for one in instances(metric, ks)]
        for check in of_values(selected, _numbers(a), _numbers(b)):
            yield replace(check, group=group, where=f"{a.name}: {check.where}")


def _numbers(record: LayerRecord) -> Measured:
    return Measured(
        values=dict(record.values),
        nulls=dict(record.nulls),
        status=dict(record.status),
        raw=dict(record.raw),
    )


# --- Markdown -----------------------------------------------------------------------------------


def heading(device: torch.device, peak: Peaks) -> list[str]:
    about = facts()
    rows = [f"# {_device_name(device)}", ""]
    rows.append(
        f"- {about['date']}; geoscope {about['geoscope']} (source {about['code']}), Python "
        f"{about['python']}, torch {about['torch']}, CUDA {torch.version.cuda}"
    )
    rows.append(f"- beside it: {about['cpu']}, {about['cores']} cores")
    if device.type == "cuda":
        rows.append(f"- such devices: {torch.cuda.device_count()}; whole compares take all of them")
    upload = "" if peak.upload is None else f", pinned upload {peak.upload / 1e9:.0f} GB/s"
    rows.append(
        f"- measured peaks: fp64 products {peak.flops / 1e12:.3g} TFLOP/s, memory "
        f"{peak.memory / 1e9:.0f} GB/s{upload}"
    )
    for name, (flops, memory) in _SHEETS.items():
        if name in _device_name(device):
            rows.append(
                f"- its data sheet: {flops / 1e12:g} TFLOP/s fp64 (reached: "
                f"{peak.flops / flops:.0%}), {memory / 1e9:g} GB/s ({peak.memory / memory:.0%})"
            )
    return rows


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (no CUDA)"


def check_table(checks: Sequence[Check]) -> list[str]:
    """The worst number of each group, and every one that failed."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.group, []).append(check)
    rows = [
        "## Agreement with the CPU",
        "",
        "The number of each group that comes nearest to what is allowed: the difference that two "
        "right computations may show.",
        "",
        "| group | numbers | off by | allowed | | where |",
        "|---|--:|--:|--:|---|---|",
    ]
    for group, members in groups.items():
        failed = [one for one in members if not one.passed]
        worst = max(members, key=lambda one: one.share)
        for one in failed or [worst]:
            rows.append(
                f"| {group} | {len(members)} | {one.off:.1e} | {_cell(one.allowed)} "
                f"| {'ok' if one.passed else '**FAILED**'} | {_cell(one.where)} |"
            )
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def stage_table(found: Sequence[Stage], peak: Peaks) -> list[str]:
    rows = [
        "## Stacks",
        "",
        "Median of warm rounds (least-most). Rates are of nominal flops and of the least traffic, "
        "fractions of the measured peaks; upload against the pinned one.",
        "",
        "| matrices | stage | ms | ms a matrix | TFLOP/s | of peak | GB/s | of peak | remark |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for one in found:
        spent = f"{_ms(one.median)} ({_ms(min(one.seconds))}-{_ms(max(one.seconds))})"
        traffic = peak.upload if one.uploads else peak.memory
        rows.append(
            f"| {one.count} × {one.shape[0]}×{one.shape[1]} | {one.name} | {spent} "
            f"| {_ms(one.median / one.count)} | {_rate(one.flops, one.median, 1e12, peak.flops)} "
            f"| {_rate(one.bytes, one.median, 1e9, traffic)} | {one.remark} |"
        )
    return rows


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _rate(amount: float, seconds: float, unit: float, peak: float | None) -> str:
    """Rate and fraction, as two cells."""
    if not amount:
        return " | "
    fraction = f"{amount / seconds / peak:.0%}" if peak else ""
    return f"{amount / seconds / unit:.3g} | {fraction}"


def model_table(found: Sequence[Stage], family: str, layers: int) -> list[str]:
    """Each stage summed over the kinds of matrices that a model has."""
    kinds = synthetic.FAMILIES[family].values()
    names = [name for name in dict.fromkeys(one.name for one in found) if not name.endswith("one")]
    rows = [
        f"## The stages over a model: {family}, {layers} layers × {len(kinds)} kinds",
        "",
        "Each stage's median, summed over the kinds. A trajectory takes the leading pair of every "
        "update, for each of its checkpoints.",
        "",
        "| stage | s | ms a matrix |",
        "|---|--:|--:|",
    ]
    for name in names:
        medians = {one.shape: one.median for one in found if one.name == name}
        shapes = [shape for shape in kinds if shape in medians]
        total = sum(medians[shape] for shape in shapes)
        label = f"**{name}**" if name == UPDATE_PAIR else name
        if len(shapes) < len(kinds):
            label += f" ({len(shapes)} of {len(kinds)} kinds)"
        rows.append(f"| {label} | {total:.3g} | {_ms(total / (layers * len(shapes)))} |")
    return rows


def whole_table(
    lines: Sequence[Timed], seconds: dict[str, float], family: str, layers: int
) -> list[str]:
    rows = [
        f"## Whole compare: {family}, layers: {layers}",
        "",
        "| | seconds, median (least-most) | cpu/this | remark |",
        "|---|--:|--:|---|",
    ]
    reference = median(lines[0].seconds)
    for line in lines:
        if not line.seconds:
            rows.append(f"| {line.label} | failed | | {line.remark} |")
            continue
        spent = median(line.seconds)
        ratio = "" if "only" in line.label else f"{reference / spent:.2f}"
        spread = f"{spent:.3g} ({min(line.seconds):.3g}-{max(line.seconds):.3g})"
        rows.append(f"| {line.label} | {spread} | {ratio} | {line.remark} |")
    if seconds:
        total = sum(seconds.values())
        rows += ["", "Stages, each kernel waited for; all threads, reading included.", ""]
        rows += ["| stage | s | of all |", "|---|--:|--:|"]
        rows += [f"| {name} | {one:.3g} | {one / total:.0%} |" for name, one in seconds.items()]
    return rows


def memory_line(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    most = torch.cuda.max_memory_allocated(device) / 1e9
    return ["", f"Most device memory in this process: {most:.2f} GB."]


# --- the command --------------------------------------------------------------------------------


def report(given: argparse.Namespace) -> tuple[str, bool]:
    """The whole document, and whether all checks passed."""
    device = torch.device(given.device)
    _say("peaks")
    peak = peaks(device)
    _say("agreement")
    checks = [*factorise_checks(device), *leading_checks(device), *metric_checks(device)]
    found: list[Stage] = []
    for shape in dict.fromkeys(synthetic.FAMILIES[given.family].values()):
        _say(f"{given.layers} × {shape[0]}×{shape[1]}")
        found += stages(*shape, given.layers, device, given.rounds)
    _say("whole compare")
    layers = given.layers if given.compare_layers is None else given.compare_layers
    lines, seconds, more = whole(given.family, layers, device, given.rounds)
    checks += more
    rows = heading(device, peak)
    rows += ["", *check_table(checks), "", *stage_table(found, peak), ""]
    rows += [*model_table(found, given.family, given.layers), ""]
    rows += [*whole_table(lines, seconds, given.family, layers), *memory_line(device)]
    sound = all(check.passed for check in checks) and all(one.sound for one in found)
    return "\n".join(rows) + "\n", sound


def _say(text: str) -> None:
    print(f"… {text}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu runs the same without CUDA")
    parser.add_argument("--family", choices=sorted(synthetic.FAMILIES), default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=28, help="matrices in a stack")
    parser.add_argument("--compare-layers", type=int, help="of the whole compare, if not as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="small shapes, two layers, one round")
    parser.add_argument("--out", type=Path, help="also write the Markdown to this file")
    given = parser.parse_args()
    if given.small:
        given.family, given.layers, given.compare_layers, given.rounds = "small", 2, 2, 1
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device")
        return 0
    set_aside_variables()
    text, passed = report(given)
    print(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")
    print("all numbers agree" if passed else "NUMBERS DISAGREE, see above", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
