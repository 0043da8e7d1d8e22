"""What a report says to people, in order, before it is text or Markdown.

Headline, numbers of the model, module kinds, worst matrices, statuses, coverage. Every number has
its null beside it; what has none is a – that a status explains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from geoscope.records import LayerRecord, Overlap, Report, Verdict
from geoscope.report.coverage import coverage_block, status_block
from geoscope.report.explain import explain_blocks
from geoscope.report.grids import MATRIX, VERDICT, code_cell, model_grid, subject_grid
from geoscope.report.numbers import DASH, number, percent, times
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import (
    Section,
    Subject,
    base_label,
    dimension,
    sections,
    with_dimension,
)
from geoscope.report.tables import Kind, kind_of

__all__ = ["headline", "page", "title"]

_WORST = 5
_COUNT = Head("n")
_LEGEND = f"(…) isotropic update of the same size · {DASH} see statuses · ~ rounding visible"


def page(report: Report, *, verbose: bool = False, explain: bool = False) -> list[Block]:
    """All blocks of a report. Raises ReportError for a kind that has no table."""
    kind = kind_of(report.kind)
    parts = sections(report)
    blocks = [Block(title(report), (_provenance(report),))]
    if len(parts) > 1:
        blocks.append(_runs_block(kind, parts))
    for part in parts:
        blocks += _section_blocks(kind, part, verbose=verbose, is_only=len(parts) == 1)
        blocks += explain_blocks(part) if explain else []
    blocks += [_overlap_block(report), _anchor_block(report)]
    blocks += [Block("", (_LEGEND,)), status_block(report), coverage_block(report)]
    return [block for block in blocks if block.lines or (block.grid and block.grid.rows)]


def title(report: Report) -> str:
    """The kind and the models, as one line."""
    tuned = ", ".join(section.label for section in sections(report))
    return f"{kind_of(report.kind).title}: {base_label(report)} → {tuned}"


def _provenance(report: Report) -> str:
    made = report.provenance
    stored = " → ".join(dict.fromkeys(ref.storage_dtype for ref in made.refs))
    return (
        f"stored as {stored or 'unknown'} · computed in {made.compute_dtype} on {made.device} · "
        f"seed {made.seed} · geoscope {made.tool_version}"
    )


def headline(kind: Kind, section: Section) -> tuple[str, str]:
    """The verdict's code with its share, and a sentence; without a verdict a sentence alone."""
    verdict = section.verdict
    if verdict is None:
        return "", _sentence(kind, section.whole)
    share = "" if verdict.share is None else f" · {percent(verdict.share)} of the update's energy"
    return f"{verdict.code}{share}", verdict.text


def _sentence(kind: Kind, whole: Subject) -> str:
    pattern, words = kind.sentence
    key = with_dimension(pattern, whole.k)
    value, null = whole.values.get(key), whole.nulls.get(key)
    if value is None:
        return f"No number for {key.removesuffix('@k')} on any matrix; see statuses."
    return words.format(value=number(value), null=number(null), k=whole.k)


def _section_blocks(kind: Kind, section: Section, *, verbose: bool, is_only: bool) -> list[Block]:
    code, sentence = headline(kind, section)
    verdict = section.verdict
    name = "" if is_only else f"{section.tuned} {section.label}"
    lines = tuple(filter(None, (sentence, _tally(verdict) if verdict else "")))
    return [
        Block(": ".join(filter(None, (name, code))), lines, code=verdict.code if verdict else ""),
        Block("model", grid=model_grid(kind, section.whole)),
        Block("modules", grid=_modules_grid(kind, section)),
        _matrices_block(kind, section, verbose=verbose),
    ]


def _tally(verdict: Verdict) -> str:
    """Matrices of each code, with their share of the energy."""
    counts = sorted(verdict.counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [
        f"{code} {count} ({percent(verdict.shares[code])})"
        if code in verdict.shares
        else f"{code} {count}"
        for code, count in counts
        if count
    ]
    return f"matrices (share of energy): {', '.join(parts)}" if parts else ""


def _runs_block(kind: Kind, parts: Sequence[Section]) -> Block:
    """Several tuned models side by side."""
    cells = [
        (
            Cell(f"{part.tuned} {part.label}"),
            Cell(part.verdict.code, code=part.verdict.code) if part.verdict else Cell(),
        )
        for part in parts
    ]
    heads = (Head("tuned", is_words=True), VERDICT)
    return Block("models", grid=subject_grid(kind, heads, cells, [part.whole for part in parts]))


def _modules_grid(kind: Kind, section: Section) -> Grid:
    flagged = Counter(
        layer.module
        for layer in section.layers
        if section.verdict and layer.name in section.verdict.flagged
    )
    heads, cells = [Head("module", is_words=True), _COUNT], []
    if flagged:
        heads.append(Head("flagged"))
    for module, subject in section.modules.items():
        row = [Cell(module), Cell(str(len(subject.layers)))]
        cells.append([*row, Cell(str(flagged[module]))] if flagged else row)
    return subject_grid(kind, heads, cells, list(section.modules.values()))


def _matrices_block(kind: Kind, section: Section, *, verbose: bool) -> Block:
    """The worst matrices, or all of them."""
    if verbose:
        name, chosen = "all matrices", list(section.layers)
    else:
        name, chosen = _worst(kind, section)
    has_code = any(layer.verdict for layer in chosen)
    heads = [MATRIX, VERDICT] if has_code else [MATRIX]
    cells = [
        [Cell(layer.name), *([code_cell(layer.verdict)] if has_code else [])] for layer in chosen
    ]
    subjects = [Subject(layer.values, layer.nulls, (layer,)) for layer in chosen]
    return Block(name, grid=subject_grid(kind, heads, cells, subjects))


def _worst(kind: Kind, section: Section) -> tuple[str, list[LayerRecord]]:
    """At most five: those the verdict flags, worst first, else the largest by the kind's number."""
    flagged = section.verdict.flagged if section.verdict else ()
    if flagged:
        by_name = {layer.name: layer for layer in section.layers}
        chosen = [by_name[name] for name in flagged if name in by_name]
        name = f"flagged: {len(flagged)} of {len(section.layers)} matrices, worst first"
        return name, chosen[:_WORST]
    sized = [
        (value, layer)
        for layer in section.layers
        if (value := _at_own_k(kind.worst, layer)) is not None
    ]
    sized.sort(key=lambda item: -item[0])
    label = kind.worst.removesuffix("@k").replace("_", " ")
    return f"largest {label}", [layer for _, layer in sized[:_WORST]]


def _at_own_k(pattern: str, layer: LayerRecord) -> float | int | None:
    return layer.values.get(with_dimension(pattern, dimension(layer)))


def _overlap_block(report: Report) -> Block:
    """Pairs of tuned models: the mean over matrices of each overlap, with its null."""
    pairs: dict[tuple[int, int], list[Overlap]] = {}
    for overlap in report.overlaps:
        pairs.setdefault((overlap.a, overlap.b), []).append(overlap)
    keys = sorted({key for overlap in report.overlaps for key in overlap.values})
    rows = tuple(
        (Cell(f"{a} with {b}"), Cell(str(len(found))), *(_mean_cell(found, key) for key in keys))
        for (a, b), found in sorted(pairs.items())
    )
    heads = (Head("updates", is_words=True), _COUNT, *(Head(key) for key in keys))
    return Block("overlap of the updates, mean over matrices", grid=Grid(heads, rows))


def _mean_cell(overlaps: Sequence[Overlap], key: str) -> Cell:
    values = [value for overlap in overlaps if (value := overlap.values.get(key)) is not None]
    nulls = [overlap.nulls[key] for overlap in overlaps if key in overlap.nulls]
    null = f"({number(sum(nulls) / len(nulls))})" if nulls else ""
    return Cell(number(sum(values) / len(values)) if values else DASH, null)


def _anchor_block(report: Report) -> Block:
    """Ratios to the anchor run."""
    anchor = report.summary.anchor
    if anchor is None:
        return Block("")
    ratios = ", ".join(f"{key} {times(value)}" for key, value in sorted(anchor["ratios"].items()))
    claim = {True: "yes", False: "no"}.get(anchor["spectrum_preserving"], "not known")
    said = f"spectrum-preserving relative to the anchor: {claim}"
    return Block(f"against the anchor {anchor['ref']['given']}", (ratios, said))
