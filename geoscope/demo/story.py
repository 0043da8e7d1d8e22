"""What the demo run shows, in a few lines, told from the numbers of its report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from geoscope.records import Report
from geoscope.thresholds import THRESHOLDS

__all__ = ["FAILED", "story"]

# The checkpoint of the run that failed, in the folder of the demo.
FAILED = Path("grpo-failed") / "checkpoint-40"

_WIDTH = 80


def story(folder: Path, steps: Sequence[Path], report: Report, failed: Report) -> str:
    """The tour: what was trained, what is seen, what a failed run looks like, what to try next.

    steps: the checkpoints of the run that learned. report: on the last of them. failed: on FAILED.
    At most 80 columns, unless the folder's name alone is longer.
    """
    base, last = _facts(folder / "base"), _facts(steps[-1])
    model, nulls = report.summary.model, report.summary.nulls
    rank_ratio = f"{_of(model, 'rank_ratio'):#.3g}"
    base_path, tuned, bad, sft = (
        shlex.quote(str(path))
        for path in (folder / "base", steps[-1], folder / FAILED, folder / "sft")
    )
    return "\n".join(
        [
            "",
            "what this is",
            "  A small transformer that adds numbers, trained for real with GRPO (reward 1",
            f"  for a right answer): {len(steps)} checkpoints, accuracy {base['accuracy']:.2f} → "
            f"{last['accuracy']:.2f}.",
            "",
            "what is seen",
            f"  The update is {_of(model, 'relative_update'):.1%} of the weights; bf16 rounding is "
            f"{_of(model, 'precision_ratio'):.1%} of it, so",
            "  its numbers are resolved. In a large model's bf16 pair they often are not.",
            f"  It uses few directions: stable rank {_of(model, 'update.stable_rank'):.1f}, where "
            f"isotropic noise has {nulls['update.stable_rank']:.0f}.",
            f"  The effective rank ratio is {rank_ratio}: no spectrum collapsed.",
            "  Small models at large learning rates move more on the base's principal",
            "  directions than large ones do: read no claim about those here.",
            "",
            *_failure(folder, base["accuracy"], failed),
            "",
            "try next",
            *_command("collapse", base_path, bad, "--explain"),
            *_command("compare", base_path, tuned, "-o report.json", "-o report.png"),
            *_command("anisotropy", base_path, sft),
            *_command("collapse", base_path, tuned, f"--anchor {sft}", "--explain"),
            *_command("metrics", "spectral_lift"),
        ]
    )


def _failure(folder: Path, accuracy: float, failed: Report) -> list[str]:
    """The run that failed, beside the one that learned."""
    facts, model, verdict = _facts(folder / FAILED), failed.summary.model, failed.summary.verdict
    assert verdict is not None
    flagged = verdict.counts.get(verdict.code, 0)
    told = (
        f"grpo-failed has the same base and 100 times the learning rate: accuracy {accuracy:.2f} → "
        f"{facts['accuracy']:.2f} in {facts['step']} steps. Verdict {verdict.code}, "
        f"{flagged} of {len(failed.layers)} matrices: the update is "
        f"{_of(model, 'relative_update'):.0%} of the weights, and singular values moved by "
        f"{_of(model, 'nss'):.0%} (limit {THRESHOLDS['distorted.nss'].value:.0%})."
    )
    indent = "  "
    lines = wrap(told, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return ["a run that failed", *lines]


def _command(*parts: str) -> list[str]:
    """A command of geoscope to copy; a long one goes on behind a backslash."""
    lines = ["  geoscope"]
    for part in parts:
        if len(f"{lines[-1]} {part} \\") <= _WIDTH:
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(f"      {part}")
    return lines


def _of(values: object, key: str) -> float:
    """A number that the demo's report always has."""
    assert isinstance(values, dict)
    return float(values[key])


def _facts(folder: Path) -> dict[str, float]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))
