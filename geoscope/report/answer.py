"""The first lines of a report: a headline that answers its question, facts, what to do next.

What is said stands in the tables of `geoscope.answers`; here the first outcome that fits is found
and its numbers are put in. Every number is the report's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from geoscope.answers import Condition, Fact, Outcome
from geoscope.errors import first_names
from geoscope.kinds import Kind
from geoscope.records import Report, Status
from geoscope.report.below import CAUTIOUS, ELSEWHERE, PARTLY, tail
from geoscope.report.content import title
from geoscope.report.coverage import compared_line
from geoscope.report.depth import depth_row
from geoscope.report.family import NOT_GIVEN, family_rows
from geoscope.report.numbers import DASH, degrees, number, share, shorten, times
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import (
    Section,
    answering,
    base_label,
    sections,
    with_dimension,
)
from geoscope.report.tables import kind_of
from geoscope.thresholds import MOTION_THRESHOLDS, limits_in_force

__all__ = ["answer", "headlines", "outcome"]

_PLACE = re.compile(r"\{([^{}:]+)(?::(share|noise))?\}")
_WHY = {
    Status.NON_FINITE: "NaN or Inf",
    Status.ZERO_UPDATE: "unchanged",
    Status.NOT_CONVERGED: "no result",
    Status.BELOW_RESOLUTION: "hidden",
}
_BESIDE = 3  # so many tuned models have a column; of more each has a row
_MODELS = 9  # so many have a row
_LABEL = 20  # letters of a name beside many columns
_ALERTS = 3


def answer(report: Report, *, rows: int | None = None, where: str = ELSEWHERE) -> list[Block]:
    """Title; headline with its facts, at most `rows` of them; coverage and what to do next.

    where: all other numbers stand.
    """
    kind, parts = kind_of(report.kind), sections(report)
    asked = answering(report)
    body = _alone(kind, parts[0], rows) if len(parts) == 1 else _several(report, parts, rows)
    first, *others = headlines(report)
    # Of more the table tells it.
    named = [] if kind.answer.is_joint or len(others) > _BESIDE else others
    alerts = _alerts(report, kind, asked)
    lines = (*named, *(line.replace(ELSEWHERE, where) for line in alerts))
    tone = _tone([outcome(kind, part).tone for part in asked])
    return [
        Block(_title(report, parts)),
        Block(first, lines, body, code=tone),
        Block("", tail(report, kind, parts, body, where)),
    ]


def _title(report: Report, parts: Sequence[Section]) -> str:
    if len(parts) <= _BESIDE:
        return title(report)
    kind = kind_of(report.kind)
    others = f"{len(parts)} {kind.answer.others}"
    return f"{kind.title}: {base_label(report)} {kind.answer.arrow} {others}"


def headlines(report: Report) -> list[str]:
    """The answer in a line; of several tuned models how many have which, then a line for each."""
    kind, parts = kind_of(report.kind), sections(report)
    if len(parts) == 1:
        return [_headline(kind, parts[0])]
    named = [_named_headline(kind, part) for part in parts]
    if kind.answer.is_joint:
        return [_headline(kind, answering(report)[0]), *named]
    counts = Counter(outcome(kind, part).first for part in parts)
    of = f"of {len(parts)} tuned models"
    told = [f"{count} {of}: {first}" for first, count in counts.most_common()]
    return ["; ".join(told), *named]


def _named_headline(kind: Kind, section: Section) -> str:
    code = _code(section)
    bracket = f" ({code})" if code else ""
    return f"{section.tuned} {section.label}: {_word(kind, section)}{bracket}"


def _word(kind: Kind, section: Section) -> str:
    """The first words of a model, or its role in a joint answer."""
    roles = dict(kind.answer.roles)
    return roles.get(_code(section), "") if roles else outcome(kind, section).first


def outcome(kind: Kind, section: Section) -> Outcome:
    """The first outcome of the kind that fits the code and the numbers."""
    code = _code(section)
    return next(
        each
        for each in kind.answer.outcomes
        if (not each.codes or code in each.codes)
        and all(_holds(condition, section) for condition in each.when)
    )


def _tone(tones: Sequence[str]) -> str:
    return next(tone for tone in ("bad", "open", "good") if tone in tones)


def _code(section: Section) -> str:
    if section.verdict is not None:
        return section.verdict.code
    return str((section.distance or {}).get("code") or "")


def _headline(kind: Kind, section: Section) -> str:
    result = outcome(kind, section)
    code = _code(section)
    words = f"{result.first}: {_filled(result.sentence, kind, section)}"
    return f"{words}  ({code}{_flagged(section)})" if code else words


def _flagged(section: Section) -> str:
    verdict = section.verdict
    if verdict is None or not verdict.counts:
        return ""
    return f", {len(verdict.flagged)} of {len(section.layers)} matrices flagged"


def _filled(sentence: str, kind: Kind, section: Section) -> str:
    """The sentence with the numbers of the model."""

    def filled(match: re.Match[str]) -> str:
        key, form = match.groups()
        if key == "verdict":
            return _own_sentence(section)
        own = with_dimension(key, section.whole.k)
        if form == "noise":
            unit = next((fact.unit for fact in kind.answer.facts if fact.id == key), "")
            return _shown(section.whole.nulls.get(own), unit)
        return _shown(section.whole.values.get(own), form or "")

    return _PLACE.sub(filled, sentence)


def _own_sentence(section: Section) -> str:
    """The first sentence of the verdict."""
    verdict = section.verdict
    if verdict is None:
        return DASH
    text = verdict.text.removeprefix(f"{verdict.code.lower()}: ").partition(". ")[0]
    return f"{text.removesuffix('.')}."


def _shown(value: float | int | None, unit: str) -> str:
    if value is None:
        return DASH
    match unit:
        case "share":
            return share(value)
        case "angle":
            return degrees(value)
        case _:
            return number(value)


# --- conditions and limits ------------------------------------------------------------------------


def _holds(condition: Condition, section: Section) -> bool:
    key = with_dimension(condition.id, section.whole.k)
    value, null = section.whole.values.get(key), section.whole.nulls.get(key)
    if condition.sign == DASH:
        return value is None
    if condition.by_noise:
        value = value / null if value is not None and null else None
    return _is_beyond(value, condition.sign, _bound(condition.limit, section))


def _is_beyond(value: float | None, sign: str, limit: float | None) -> bool:
    if value is None or limit is None:
        return False
    return value < limit if sign == "<" else value >= limit


def _limits(section: Section) -> Mapping[str, float]:
    """The limits of the verdict; none without one."""
    return {} if section.verdict is None else section.verdict.thresholds


def _bound(limit: float | str, section: Section) -> float:
    """A limit by its name as it is in force, with a verdict or without; or the number itself."""
    if not isinstance(limit, str):
        return limit
    usual = {**limits_in_force(None), **MOTION_THRESHOLDS, **section.limits}
    return _limits(section).get(limit, usual[limit])


def _limit(fact: Fact, section: Section, null: float | None) -> float | None:
    """The limit in force for this fact: of an angle the larger of its limit and its null's.

    The steps of a series begin with that of its base.
    """
    limits = _limits(section)
    if fact.from_steps and len(section.steps) <= limits.get(fact.from_steps, 0):
        return None
    limit = limits.get(fact.limit, section.whole.values.get(fact.limit))
    over = limits.get(fact.over_null)
    if limit is None or over is None or null is None:
        return limit
    return max(limit, over * null)


# --- what needs the user --------------------------------------------------------------------------


def _alerts(report: Report, kind: Kind, parts: Sequence[Section]) -> list[str]:
    """What to do, matrices that were not compared, and those that differ from the headline."""
    lines = [f"→ {compared_line(report)}. Reasons: `details`."] if report.coverage.missing else []
    holders: dict[str, list[str]] = {}
    for part in parts:
        for words in filter(None, (outcome(kind, part).todo, _odd(part), _apart(part))):
            holders.setdefault(words, []).append(part.label)
    for words, labels in holders.items():
        name = "" if len(labels) == len(parts) else f"{first_names(labels, limit=2)}: "
        lines.append(f"→ {name}{words}")
    more = len(lines) - _ALERTS
    return lines if more <= 0 else [*lines[:_ALERTS], f"→ {more} more: `details`."]


def _odd(section: Section) -> str:
    """Flagged matrices of a model whose own code flags nothing."""
    verdict = section.verdict
    if verdict is None or not verdict.flagged:
        return ""
    flagged = set(verdict.flagged) - set(verdict.apart)
    codes = Counter(
        str(layer.verdict["code"])
        for layer in section.layers
        if layer.verdict and layer.name in flagged
    )
    if not codes or verdict.code in codes:
        return ""
    told = ", ".join(f"{code} {count}" for code, count in codes.most_common())
    worst = next(name for name in verdict.flagged if name in flagged)
    return f"Look at {told}, worst {shorten(worst, 40)}: `details`."


def _apart(section: Section) -> str:
    verdict = section.verdict
    if verdict is None or not verdict.apart:
        return ""
    first = shorten(verdict.apart[0], 40)
    more = f" and {len(verdict.apart) - 1} more" if len(verdict.apart) > 1 else ""
    return f"Set apart, no update of the base's: {first}{more}."


# --- facts ----------------------------------------------------------------------------------------


def _alone(kind: Kind, section: Section, rows: int | None) -> Grid:
    """A row for each fact that has a number, or a reason for having none."""
    said = kind.answer
    heads = (
        Head("", is_words=True),
        Head("", is_words=True, is_extra=True),
        *map(Head, ("here", said.noise[0], "limit")),
        Head("", is_words=True),
    )
    about = outcome(kind, section).about
    facts = [fact for fact in said.facts if _stands(fact, about)]
    cells = [row for fact in facts if (row := _row(fact, section))]
    cells += [row] if said.by_block and not about and (row := depth_row(section)) else []
    return Grid(heads, tuple(cells[:rows]))


def _stands(fact: Fact, about: Sequence[str]) -> bool:
    return fact.id in about if about else not fact.is_aside


def _row(fact: Fact, section: Section) -> tuple[Cell, ...]:
    whole = section.whole
    key = _key(fact, section)
    value, null = whole.values.get(key), whole.nulls.get(key)
    if value is None:
        reason = _reason(key, section)
        return _cells(fact, section, DASH, "", "", reason) if reason else ()
    limit = _limit(fact, section, null)
    return _cells(
        fact,
        section,
        _shown(value, fact.unit) + _mark(key, section),
        "" if null is None else _shown(null, fact.unit),
        "" if limit is None else _shown(limit, fact.unit),
        _reading(fact, section, value, null, limit),
    )


def _cells(fact: Fact, section: Section, *texts: str) -> tuple[Cell, ...]:
    k = section.whole.k
    return tuple(map(Cell, (fact.label, fact.words.format(k=k), *texts)))


def _key(fact: Fact, section: Section) -> str:
    """The id, or of two the one with the larger number."""
    values, k = section.whole.values, section.whole.k
    keys = [with_dimension(key, k) for key in (fact.id, fact.other) if key]
    known = [(value, key) for key in keys if (value := values.get(key)) is not None]
    return max(known)[1] if known else keys[0]


def _reason(key: str, section: Section) -> str:
    """Why the model has no number; nothing for one that does not apply or is not in the report."""
    statuses = Counter(layer.status_of(key) for layer in section.layers if key in layer.values)
    reasons = [status for status, _ in statuses.most_common() if status in _WHY]
    return _WHY[reasons[0]] if reasons else ""


def _mark(key: str, section: Section) -> str:
    if 0 < section.whole.numbered(key) < len(section.layers):
        return PARTLY
    return CAUTIOUS if section.whole.is_cautioned(key) else ""


def _reading(
    fact: Fact, section: Section, value: float, null: float | None, limit: float | None
) -> str:
    """A word: beyond the limit, or where the number is on its scale."""
    if fact.beyond and _is_beyond(value, fact.sign, limit):
        return fact.beyond
    measured = value
    if fact.by_noise:
        if not null:
            return ""
        measured = value / null
    for name, word in fact.scale:
        bound = _bound(name, section)
        if measured < bound or measured == bound == 0:
            return word
    if fact.scale:
        return fact.rest.format(times=times(measured))
    return "ok" if limit is not None and fact.beyond else ""


# --- several tuned models -------------------------------------------------------------------------


def _several(report: Report, parts: Sequence[Section], rows: int | None) -> Grid:
    """The facts that have a number in one of them: of few models a row each, of many a column."""
    kind = kind_of(report.kind)
    facts = [
        fact
        for fact in kind.answer.facts
        if fact.label and not fact.is_aside and _is_known(fact, parts)
    ]
    if not kind.answer.is_joint and len(parts) <= _BESIDE:
        return _models_beside(facts[:rows], parts)
    named: list[tuple[str, Section | None]] = [
        (f"{part.tuned} {part.label}", part) for part in parts
    ]
    if kind.answer.is_joint:
        named = _in_family(report, parts)
    return _models_below(kind, facts, named, min(_MODELS, rows or _MODELS))


def _in_family(report: Report, parts: Sequence[Section]) -> list[tuple[str, Section | None]]:
    """Candidates as they were given; of more than three in a tree with the model."""
    known = {part.tuned: part for part in parts}
    labels = {n: f"{n} {shorten(part.label, _LABEL)}" for n, part in known.items()}
    tree = family_rows(report) if len(parts) > _BESIDE else []
    others = {0: f"• {shorten(base_label(report), _LABEL)}", NOT_GIVEN: "(not given)"}
    return [
        ("  " * depth + {**others, **labels}[number], known.get(number)) for depth, number in tree
    ] or [(labels[n], part) for n, part in known.items()]


def _models_beside(facts: Sequence[Fact], parts: Sequence[Section]) -> Grid:
    names = (Head("", is_words=True), Head("", is_words=True, is_extra=True))
    k = parts[0].whole.k
    rows = [
        (
            *(Cell(fact.label), Cell(fact.words.format(k=k))),
            *(_beside_null(fact, part) for part in parts),
        )
        for fact in facts
    ]
    return Grid((*names, *(Head(str(part.tuned)) for part in parts)), tuple(rows))


def _models_below(
    kind: Kind, facts: Sequence[Fact], named: Sequence[tuple[str, Section | None]], most: int
) -> Grid:
    heads = [Head(kind.answer.others.partition(" ")[0], is_words=True)]
    heads += [Head("answer", is_words=True), *(Head(fact.label) for fact in facts)]
    shown = named if len(named) <= most else named[: most - 1]
    table = [_model_row(kind, facts, name, part) for name, part in shown]
    if len(table) < len(named):
        table.append((Cell(f"… {len(named) - len(table)} more: `details`"),))
    return Grid(tuple(heads), tuple(table))


def _model_row(
    kind: Kind, facts: Sequence[Fact], name: str, section: Section | None
) -> tuple[Cell, ...]:
    """One without a section is no tuned model of the report."""
    if section is None:
        return (Cell(name), *(Cell() for _ in range(len(facts) + 1)))
    tone = "" if kind.answer.roles else outcome(kind, section).tone
    return (
        Cell(name),
        Cell(_word(kind, section), code=tone),
        *(_beside_null(fact, section) for fact in facts),
    )


def _is_known(fact: Fact, parts: Sequence[Section]) -> bool:
    return any(part.whole.values.get(_key(fact, part)) is not None for part in parts)


def _beside_null(fact: Fact, section: Section) -> Cell:
    key = _key(fact, section)
    value, null = section.whole.values.get(key), section.whole.nulls.get(key)
    text = _shown(value, fact.unit) + ("" if value is None else _mark(key, section))
    has_null = null is not None and fact.has_own_null
    return Cell(text, f"({_shown(null, fact.unit)})" if has_null else "")
