"""What the demo run shows, in a few lines, told from the numbers of its report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from geoscope.records import Report

__all__ = ["story"]

_WIDTH = 80


def story(folder: Path, steps: Sequence[Path], report: Report) -> str:
    """The tour: what was trained, what is seen, what to try next.

    At most 80 columns, unless the folder's name alone is longer.
    """
    base, last = _facts(folder / "base"), _facts(steps[-1])
    model, nulls = report.summary.model, report.summary.nulls
    rank_ratio = f"{_of(model, 'rank_ratio'):#.3g}"
    base_path, tuned, sft = (
        shlex.quote(str(path)) for path in (folder / "base", steps[-1], folder / "sft")
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
            "try next",
            *_command("compare", base_path, tuned, "-o report.json", "-o report.png"),
            *_command("anisotropy", base_path, sft),
            *_command("collapse", base_path, tuned, f"--anchor {sft}", "--explain"),
            *_command("metrics", "spectral_lift"),
        ]
    )


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
