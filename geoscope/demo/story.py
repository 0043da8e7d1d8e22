"""What the demo run shows, in a few lines, told from the numbers of its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from geoscope.records import Report

__all__ = ["story"]


def story(folder: Path, steps: Sequence[Path], report: Report) -> str:
    """The tour: what was trained, what is seen, what to try next. At most 80 columns."""
    base, last = _facts(folder / "base"), _facts(steps[-1])
    model, nulls = report.summary.model, report.summary.nulls
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
            f"  The weights kept {_of(model, 'rank_ratio'):.1%} of their effective rank: no "
            "spectrum",
            "  collapsed. Small models at large learning rates move more on the base's",
            "  principal directions than large ones do: read no claim about those here.",
            "",
            "try next",
            f"  geoscope compare {folder}/base {steps[-1]} -o report.json -o report.png",
            f"  geoscope anisotropy {folder}/base {folder}/sft",
            f"  geoscope collapse {folder}/base {steps[-1]} --anchor {folder}/sft --explain",
            "  geoscope metrics spectral_lift",
        ]
    )


def _of(values: object, key: str) -> float:
    """A number that the demo's report always has."""
    assert isinstance(values, dict)
    return float(values[key])


def _facts(folder: Path) -> dict[str, float]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))
