"""Checks and times everything that runs on CUDA, in one call; Markdown on standard output.

1. Does CUDA give the CPU's numbers? Every metric, and factorise in hard cases.
2. Stacks of a model's matrices through factorise, stage by stage, beside the device's peaks.
3. The whole `compare` on synthetic checkpoints, CUDA and CPU.

Ends with 0 and the line "no CUDA device" where there is none, with 1 where numbers disagree.

    python benchmarks/gpu.py [--layers 28] [--out table.md]
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
from agreement import KS, Check, factorise_checks, metric_checks, of_values
from machine import child, facts, set_aside_variables
from stacks import Peaks, Stage, peaks, stages

from geoscope.analysis import Options, compare
from geoscope.metrics import METRICS, Measured, instances
from geoscope.metrics.measure import verdict_dimension
from geoscope.records import LayerRecord, Report

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
) -> tuple[list[Timed], list[Check]]:
    """Times of the whole comparison, and the agreement of its reports."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        synthetic.write(folder, family, layers)
        base, tuned = str(folder / "base"), str(folder / "tuned")
        lines = _processes(base, tuned, device, rounds)
        warm, reports = _in_process(base, tuned, device, rounds)
        small, one_by_one = _once(base, tuned, Options(device=str(device), max_memory="0"))
        _, reference = _once(base, tuned, Options(device="cpu"))
    same = "identical when repeated" if _same(*reports[:2]) else "NOT identical when repeated"
    lines.append(Timed(f"{device}, warm process", warm, same))
    lines.append(Timed(f"{device}, one pair a batch", [small]))
    checks = [
        *_agreement("whole compare", reference, reports[0]),
        *_agreement("whole compare, one pair a batch", reports[0], one_by_one),
    ]
    return lines, checks


def _processes(base: str, tuned: str, device: torch.device, rounds: int) -> list[Timed]:
    """Computing part in processes of their own, in turns; CUDA starts cold there."""
    kinds = {
        "cpu": ("cpu", ()),
        f"{device}, cold process": (str(device), ()),
        f"{device}, cold process, --quick": (str(device), ("--quick",)),
        f"{device}, cold process, --curves --masks": (str(device), ("--curves", "--masks")),
    }
    seconds: dict[str, list[float]] = {label: [] for label in kinds}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for label, (where, options) in kinds.items():
            command = [sys.executable, str(HERE / "computing.py"), base, tuned]
            run = child([*command, "--device", where, *options], ours=True)
            if run.answer is None:
                failures[label] = run.failure or "it printed no JSON"
            else:
                seconds[label].append(run.answer["seconds"])
    return [Timed(label, seconds[label], failures.get(label, "")) for label in kinds]


def _in_process(
    base: str, tuned: str, device: torch.device, rounds: int
) -> tuple[list[float], list[Report]]:
    found = [_once(base, tuned, Options(device=str(device))) for _ in range(max(rounds, 1) + 1)]
    return [seconds for seconds, _ in found[1:]], [report for _, report in found]


def _once(base: str, tuned: str, options: Options) -> tuple[float, Report]:
    started = time.perf_counter()
    report = compare(base, tuned, options=options)
    return time.perf_counter() - started, report


def _same(a: Report, b: Report) -> bool:
    return a.layers == b.layers and a.summary == b.summary


def _agreement(group: str, ours: Report, theirs: Report) -> Iterator[Check]:
    """Every number of two reports on the same matrices."""
    for a, b in zip(ours.layers, theirs.layers, strict=True):
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


def whole_table(lines: Sequence[Timed], family: str, layers: int) -> list[str]:
    rows = [
        f"## Whole compare: {family}, layers: {layers}",
        "",
        "| | seconds, median (least-most) | cpu/this | remark |",
        "|---|--:|--:|---|",
    ]
    reference = median(lines[0].seconds) if lines[0].seconds else None
    for line in lines:
        if not line.seconds:
            rows.append(f"| {line.label} | failed | | {line.remark} |")
            continue
        spent = median(line.seconds)
        ratio = f"{reference / spent:.2f}" if reference else ""
        spread = f"{spent:.3g} ({min(line.seconds):.3g}-{max(line.seconds):.3g})"
        rows.append(f"| {line.label} | {spread} | {ratio} | {line.remark} |")
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
    checks = [*factorise_checks(device), *metric_checks(device)]
    found: list[Stage] = []
    for shape in dict.fromkeys(synthetic.FAMILIES[given.family].values()):
        _say(f"{given.layers} × {shape[0]}×{shape[1]}")
        found += stages(*shape, given.layers, device, given.rounds)
    _say("whole compare")
    lines, more = whole(given.family, given.compare_layers, device, given.rounds)
    checks += more
    rows = heading(device, peak)
    rows += ["", *check_table(checks), "", *stage_table(found, peak), ""]
    rows += [*whole_table(lines, given.family, given.compare_layers), *memory_line(device)]
    sound = all(check.passed for check in checks) and all(one.sound for one in found)
    return "\n".join(rows) + "\n", sound


def _say(text: str) -> None:
    print(f"… {text}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu runs the same without CUDA")
    parser.add_argument("--family", choices=sorted(synthetic.FAMILIES), default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=28, help="matrices in a stack")
    parser.add_argument("--compare-layers", type=int, default=4, help="of the whole compare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the Markdown to this file")
    given = parser.parse_args()
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
