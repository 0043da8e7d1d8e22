"""What a report says to people, in order, before it is text or Markdown.

Headline, numbers of the model, module kinds, worst matrices, statuses, coverage. Every number has
its null beside it; what has none is a – that a status explains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from geoscope.kinds import Kind
from geoscope.records import Report, Verdict
from geoscope.report.beside import anchor_block, overlap_block
from geoscope.report.coverage import coverage_block, status_block
from geoscope.report.depth import depth_block
from geoscope.report.explain import explain_blocks
from geoscope.report.grids import MATRIX, VERDICT, code_cell, model_grid, subject_grid
from geoscope.report.methods import methods_block
from geoscope.report.numbers import DASH, number, percent
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import (
    Section,
    Subject,
    base_label,
    dimensions,
    sections,
    with_dimension,
)
from geoscope.report.tables import kind_of
from geoscope.report.worst import worst, worst_words

__all__ = ["headline", "page", "title"]

_WORST = 5
_COUNT = Head("n")


def page(report: Report, *, verbose: bool = False, explain: bool = False) -> list[Block]:
    """All blocks of a report. Raises ReportError for a kind that has no table."""
    kind = kind_of(report.kind)
    parts = sections(report)
    first = parts[0]
    blocks = [Block(title(report), (_provenance(report),))]
    if len(parts) > 1:
        blocks.append(_runs_block(kind, parts))
    for part in parts:
        blocks += _section_blocks(kind, part, verbose=verbose, is_only=len(parts) == 1)
        blocks += explain_blocks(part) if explain else []
    blocks += [overlap_block(report, first), anchor_block(report, kind, first)]
    blocks += [Block("", (_legend(kind),)), status_block(report), coverage_block(report)]
    return [block for block in blocks if block.lines or (block.grid and block.grid.rows)]


def _legend(kind: Kind) -> str:
    rounding = " · ~ rounding visible" if kind.has_cautions else ""
    return f"(…) {kind.null[1]} · {DASH} see statuses{rounding}"


def title(report: Report) -> str:
    """The kind and the models, as one line."""
    kind = kind_of(report.kind)
    tuned = ", ".join(section.label for section in sections(report))
    return f"{kind.title}: {base_label(report)} {kind.answer.arrow} {tuned}"


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
        return _without_verdict(kind, section)
    share = "" if verdict.share is None else f" · {percent(verdict.share)} {kind.share[0]}"
    share += f" without {len(verdict.apart)} set apart" if share and verdict.apart else ""
    return f"{verdict.code}{share}", verdict.text


def _without_verdict(kind: Kind, section: Section) -> tuple[str, str]:
    """How far the model is from the base, before the sentence of the kind."""
    sentence, far = _sentence(kind, section.whole), section.distance
    if far is None:
        return "", sentence
    text = str(far["text"])
    if far["code"] is None:
        return "", f"{text[:1].upper()}{text[1:]}. With them: {sentence}"
    return str(far["code"]), f"{text}. {sentence}"


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
    lines = tuple(filter(None, (sentence, _tally(kind, verdict) if verdict else "")))
    blocks = [
        Block(": ".join(filter(None, (name, code))), lines, code=verdict.code if verdict else ""),
        _model_block(kind, section, verbose=verbose),
        Block("modules", grid=_modules_grid(kind, section)),
        depth_block(kind, section),
        _matrices_block(kind, section, verbose=verbose),
    ]
    return [*blocks, methods_block(section)] if verbose else blocks


def _model_block(kind: Kind, section: Section, *, verbose: bool) -> Block:
    """The model's numbers, and at which k they stand."""
    whole = section.whole
    every = dimensions(whole.values)
    ks = every if verbose else whole.telling_ks
    lines: list[str] = []
    if section.verdict and len(whole.own_ks) > 1:
        own = _listed(whole.own_ks)
        lines.append(f"each row has one k; the verdict takes each matrix at its own (k = {own})")
    if beyond := [k for k in every if k not in ks]:
        k = _listed(beyond)
        lines.append(f"left out: k = {k}, above an eighth of every shorter side (see `verbose`)")
    grid = model_grid(kind, whole, ks)
    return Block("model", tuple(lines) if grid.rows else (), grid)


def _listed(ks: Sequence[int]) -> str:
    """`4, 8`, or the ends of a long list."""
    return ", ".join(map(str, ks)) if len(ks) <= 4 else f"{ks[0]} … {ks[-1]}"


def _tally(kind: Kind, verdict: Verdict) -> str:
    """Matrices of each code, with their share."""
    counts = sorted(verdict.counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [
        f"{code} {count} ({percent(verdict.shares[code])})"
        if code in verdict.shares
        else f"{code} {count}"
        for code, count in counts
        if count
    ]
    return f"{kind.share[1]}: {', '.join(parts)}" if parts else ""


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
        name, chosen = worst_words(section), worst(section, _WORST)
    has_code = any(layer.verdict for layer in chosen)
    heads = [MATRIX, VERDICT] if has_code else [MATRIX]
    cells = [
        [Cell(layer.name), *([code_cell(layer.verdict)] if has_code else [])] for layer in chosen
    ]
    subjects = [Subject(layer.values, layer.nulls, (layer,)) for layer in chosen]
    return Block(name, grid=subject_grid(kind, heads, cells, subjects))
