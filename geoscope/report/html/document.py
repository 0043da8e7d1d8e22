"""The page: answer, maps, figures, the worst matrices, all numbers, all matrices, provenance."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from geoscope.records import Report
from geoscope.report.answer import answer
from geoscope.report.content import page
from geoscope.report.explain import explain_blocks
from geoscope.report.html.cosines import cosines
from geoscope.report.html.maps import maps
from geoscope.report.html.matrices import table
from geoscope.report.html.pictures import pictures
from geoscope.report.html.templates import rendered, script_hash, static
from geoscope.report.plain import plain
from geoscope.report.sections import Section, sections
from geoscope.report.tables import kind_of

__all__ = ["render_html", "render_notebook"]

_BELOW = "below"
_NAMED = 500  # so many matrices are named beside the table of all


def render_html(report: Report) -> str:
    """One file, without a request to anywhere; it reads without its script."""
    report = plain(report)
    kind, parts = kind_of(report.kind), sections(report)
    title, *told = answer(report, where=_BELOW)
    script = static("page.js")
    return rendered(
        "page.html",
        title=title.title,
        told=told,
        models=_models(parts),
        cosines=cosines(report, parts),
        maps=maps(kind, parts),
        pictures=pictures(kind, parts),
        details=page(report)[1:],
        explained=[block for part in parts for block in explain_blocks(part, _NAMED)],
        table=table(kind, parts),
        missing=report.coverage.missing[:_NAMED],
        more_missing=max(0, len(report.coverage.missing) - _NAMED),
        provenance=_provenance(report),
        style=static("page.css"),
        script=script,
        script_hash=script_hash(script),
    )


def render_notebook(report: Report) -> str:
    """The headline, its facts and the tables, for a cell of a notebook: no style, no script."""
    report = plain(report)
    _, *told = answer(report, where=_BELOW)
    return rendered("notebook.html", told=[*told, *page(report)])


def _models(parts: Sequence[Section]) -> list[str]:
    """Of several tuned models the labels; those that the figures draw have a colour in the page."""
    return [f"{part.tuned} {part.label}" for part in parts] if len(parts) > 1 else []


def _provenance(report: Report) -> Mapping[str, Any]:
    """The models, what decides the numbers, and the command; where files lay is left out."""
    made = report.provenance
    roles = ("base", *("tuned" for _ in made.refs[1:]))
    return {
        "refs": list(zip(roles, made.refs, strict=False)),
        "facts": [
            ("geoscope", made.tool_version),
            ("computed", f"in {made.compute_dtype} on {made.device}, seed {made.seed}"),
            ("took", f"{made.seconds:.3g} s"),
        ],
        "parameters": [
            (key, json.dumps(value, ensure_ascii=False))
            for key, value in sorted(made.parameters.items())
            if value not in (None, [], (), False)
        ],
        "command": shlex.join(("geoscope", *made.argv[1:])) if made.argv else "",
    }
