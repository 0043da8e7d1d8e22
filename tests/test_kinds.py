"""One frozen table of report kinds: complete, and the only place that tells kinds apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import geoscope
from geoscope import kinds
from geoscope.kinds import FAR, KINDS, PAIR_KINDS
from geoscope.metrics import FAMILIES, RULES
from geoscope.report.tables import QUANTITIES

PACKAGE = Path(geoscope.__file__).parent


def test_nothing_can_be_added_to_it() -> None:
    with pytest.raises(TypeError):
        KINDS["another"] = KINDS["compare"]  # pyright: ignore[reportIndexIssue]


def test_what_it_names_exists() -> None:
    assert set(FAMILIES) == {family for kind in KINDS.values() for family in kind.families}
    for name, kind in KINDS.items():
        ids = {*kind.columns, kind.sentence[0], *(id for _, group in kind.model for id in group)}
        assert ids <= QUANTITIES.keys(), name
        if name in PAIR_KINDS and kind.judge is not None:
            assert kind.judge in RULES, name


def test_codes_are_those_of_the_judge() -> None:
    assert KINDS["anisotropy"].codes == ()
    for judge in (kinds.UPDATE, kinds.CAPACITY, kinds.MOTION):
        assert judge.codes[:2] == FAR
        assert len(set(judge.codes)) == len(judge.codes)
        assert judge.blind_start in judge.codes


def told_apart(path: Path) -> list[str]:
    """Comparisons of anything called `kind` with the name of a kind of report."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and "kind" in ast.unparse(node.left).split("."):
            words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if set(map(str, words)) & KINDS.keys():
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_no_other_file_tells_kinds_apart(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text('x = report.kind == "capacity" or kind in ("collapse",)\n')
    assert len(told_apart(probe)) == 2
    assert [hit for path in sorted(PACKAGE.rglob("*.py")) for hit in told_apart(path)] == []
