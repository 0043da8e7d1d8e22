"""METRICS in words: for `geoscope metrics` and for the reference page of the docs."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from geoscope.errors import OptionError
from geoscope.metrics.metric import Metric
from geoscope.metrics.precision import FLOORS
from geoscope.metrics.table import FAMILIES, METRICS

__all__ = ["describe", "dumps", "find", "listing", "reference_page"]

_SCHEMA = "geoscope.metrics/1"
_WIDTH = 80  # of the text, where a word allows it

_FAMILY_WORDS = {
    "size": "Size and precision: how large is the update, and how much of it is rounding?",
    "spectrum": "Spectrum of base, tuned and update: how many directions?",
    "update_alignment": "Alignment of the update: on or off the base's principal directions?",
    "base_alignment": "Alignment of base and tuned: did the leading subspaces turn?",
    "collapse": "Collapse: did the singular values change, or only the frames?",
    "masks": "Masks: which weights visibly moved?",
    "capacity": "Capacity: how much of its rank does an update use, and which would hold it?",
}
# What the limits of a floor are of, and a word on it; else ν.
_NOISE = {"amplitude": ("ν·√(q/PR)", "; q of a product: its rank")}
_FLOOR_WORDS = {
    "angle": "below what rounding alone turns: BELOW_RESOLUTION",
    "gap": "below what rounding the base may open: CAUTION",
    "edge": "nothing above the noise: BELOW_RESOLUTION",
    **{
        name: f"{name}-weighted: OK to {noise} = {fine:g}, CAUTION to {usable:g}, "
        f"then BELOW_RESOLUTION{more}"
        for name, (fine, usable) in FLOORS.items()
        for noise, more in [_NOISE.get(name, ("ν", ""))]
    },
}
_RULE_WORDS = {
    "mean": "unweighted mean",
    "sum": "sum",
    "max": "maximum",
    "root_sum_square": "√Σ of squares",
    "parameters": "weighted by parameters",
    "energy": "weighted by ‖ΔW‖²",
    "changed": "weighted by changed entries",
    "relative_update": "√(Σ‖ΔW‖²/Σ‖W0‖²) over changed matrices",
    "precision_ratio": "√(Σnoise²/Σ‖ΔW‖²)",
    "base_cosine": "cosine of all matrices as one vector",
    "lift": "ratio of the aggregated energies to their aggregated nulls",
    "versus_base": "ratio of the aggregated energies to the aggregated E_k",
}


def find(text: str) -> Metric:
    """The metric of an id, however much of it is filled in: `lift`, `lift@64`, `update.k90`.

    Raises OptionError with near names.
    """
    try:
        return METRICS[text]
    except KeyError as error:
        raise OptionError(error.args[0]) from None


def listing() -> str:
    """Every metric with its formula, by family."""
    width = max(len(_shown_id(one)) for one in METRICS)
    lines: list[str] = []
    for family in FAMILIES:
        lines += ["", _FAMILY_WORDS[family]]
        for one in METRICS:
            if one.family == family:
                lines += _entry(_shown_id(one), one.formula, width)
    lines += ["", "ROLE is base, tuned or update. `geoscope metrics ID` shows one whole."]
    return "\n".join(lines[1:])


def _entry(label: str, text: str, width: int) -> list[str]:
    """A label and its text, which goes on under itself."""
    first = f"  {label:<{width}}  "
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shown_id(metric: Metric) -> str:
    return f"ROLE.{metric.id}" if metric.per_role else metric.id


def describe(metric: Metric) -> str:
    """One metric, whole, as text."""
    width = max(len(label) for label, _ in _facts(metric))
    lines = [_shown_id(metric)]
    for label, text in _facts(metric):
        lines += _entry(label, text, width)
    return "\n".join(lines)


def dumps(metrics: Sequence[Metric]) -> str:
    """Metrics as strict JSON, keys sorted; what does not apply is null."""
    document = {"schema": _SCHEMA, "metrics": [_row(metric) for metric in metrics]}
    return json.dumps(document, sort_keys=True, allow_nan=False, ensure_ascii=False)


def _row(metric: Metric) -> dict[str, Any]:
    return {
        "id": _shown_id(metric),
        "family": metric.family,
        "formula": metric.formula,
        "range": metric.range,
        "unit": metric.unit or None,
        "null": metric.null.text if metric.null else None,
        "reading": metric.reading,
        "caution": metric.caution,
        "floor": metric.floor,
        "aggregate": metric.aggregate,
        "source": metric.source,
        "option": f"--{metric.option}" if metric.option else None,
    }


def _facts(metric: Metric) -> Sequence[tuple[str, str]]:
    facts = [
        ("formula", metric.formula),
        ("range", metric.range + (f" {metric.unit}" if metric.unit else "")),
        ("null", metric.null.text if metric.null else "–"),
        ("reading", metric.reading),
        ("do not conclude", metric.caution),
        ("precision", _FLOOR_WORDS[metric.floor] if metric.floor else "no floor"),
        ("over matrices", _RULE_WORDS[metric.aggregate]),
        ("source", metric.source),
    ]
    if metric.option:
        facts.append(("only with", f"--{metric.option}"))
    return facts


def reference_page() -> str:
    """The metric reference of the docs, Markdown; a test keeps the file equal to this."""
    lines = [
        "# Metrics",
        "",
        "Generated from `METRICS` (`geoscope/metrics/table.py`); do not edit by hand. W0 is the "
        "base, W1 the tuned weight, ΔW = W1 − W0 the update; (m, n) = (out, in), q = min(m, n), "
        "M = max(m, n), β = q/M, ρ the relative update, ν the rounding-noise ratio. `@k` stands "
        "for a subspace dimension, ROLE for base, tuned or update.",
        "",
        "Precision floors concern quantities of the update; a number below its floor is null with "
        "the status `BELOW_RESOLUTION` and kept under `raw`.",
    ]
    for family in FAMILIES:
        lines += ["", f"## {_FAMILY_WORDS[family]}"]
        for one in METRICS:
            if one.family != family:
                continue
            lines += ["", f"### `{_shown_id(one)}`", ""]
            lines += [f"- **{label}**: {_linked(_escape(text))}" for label, text in _facts(one)]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _linked(text: str) -> str:
    """With links to sections of other pages and to papers."""
    text = re.sub(r"docs/([\w-]+\.md#[\w-]+)", r"[\1](\1)", text)
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)
