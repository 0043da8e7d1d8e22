"""Is every number that geoscope reports defined in a page that users have, and cited from there?"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

from geoscope.adapters.facts import FACTS
from geoscope.metrics import METRICS, THRESHOLDS
from geoscope.records import Status
from geoscope.trajectory.extrapolators import EXTRAPOLATORS
from geoscope.trajectory.metric_relation import METRIC_RELATIONS
from geoscope.trajectory.spatial_rank1 import SPATIAL
from geoscope.trajectory.statistics import STATISTICS
from tests.helpers.pages import DOCS, PAGES, ROOT, name_of, sections, text_of

METHODS = sections(DOCS / "methods.md")
SOURCES = [
    path
    for folder in ("geoscope", "tests", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
_ELSEWHERE = re.compile(r"(?<!`)\b(?:METHOD|FORMAT)S\b(?!`)")
_PLACE = re.compile(r"\bdocs/([\w/-]+\.md)(?:#([\w-]+))?")


def words_of(path: Path) -> str:
    """All of a page; of a Python file its comments and strings, without the names of code."""
    text = text_of(path)
    if path.suffix != ".py":
        return text
    nodes = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    strings = [value for value in nodes if isinstance(value, str) and not value.isidentifier()]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*strings, *comments])


def cites_elsewhere(path: Path) -> bool:
    """Whether prose names a document that users do not have."""
    return bool(_ELSEWHERE.search(text_of(path)) and _ELSEWHERE.search(words_of(path)))


def test_nothing_cites_a_document_that_is_not_here() -> None:
    assert not [name_of(path) for path in [*SOURCES, *PAGES] if cites_elsewhere(path)]


def test_the_probe_sees_citations(tmp_path: Path) -> None:
    page, code, name = tmp_path / "page.md", tmp_path / "code.py", tmp_path / "name.py"
    word = "METHODS"
    page.write_text(f"by {word} §3", encoding="utf-8")
    code.write_text(f"x = 1  # {word} §4\n", encoding="utf-8")
    name.write_text(f"{word} = 1\n__all__ = ['{word}']  # see `{word}`\n", encoding="utf-8")
    assert [cites_elsewhere(path) for path in (page, code, name)] == [True, True, False]


def test_places_that_code_cites_exist() -> None:
    wrong = [
        f"{name_of(path)}: {match[0]}"
        for path in SOURCES
        for match in _PLACE.finditer(text_of(path))
        if not (DOCS / match[1]).is_file()
        or (match[2] and match[2] not in sections(DOCS / match[1]))
    ]
    assert not wrong


def test_every_metric_is_defined_where_its_source_says() -> None:
    wrong = []
    for metric in METRICS:
        anchor = metric.source.partition("docs/methods.md#")[2]
        if f"`{metric.id}`" not in METHODS.get(anchor, ""):
            wrong.append(f"{metric.id}: {metric.source}")
    assert not wrong


def test_every_number_of_series_and_starts_is_defined() -> None:
    text = text_of(DOCS / "methods.md")
    relations = [one for one in METRIC_RELATIONS if not one.endswith("_p")]
    names = [*STATISTICS, *relations, *EXTRAPOLATORS, *SPATIAL, *FACTS, *Status]
    assert not [name for name in names if f"`{name}`" not in text]


def test_every_threshold_has_a_reason() -> None:
    given = re.findall(r"`([a-z_]+\.[a-z0-9_]+)`", METHODS["thresholds"])
    assert sorted(given) == sorted(THRESHOLDS)


def test_every_paper_cited_is_in_the_references() -> None:
    cited = " ".join([*METHODS.values(), *(one.source for one in METRICS)])
    papers = set(re.findall(r"\b\d{4}\.\d{5}\b", cited))
    assert papers
    assert not {one for one in papers if f"{one}: " not in METHODS["references"]}
