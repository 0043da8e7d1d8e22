"""`geoscope lineage` as a user meets it: twenty lines, the tree, files, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from geoscope.report import read
from tests.helpers.families import Updates, drawn, tuned
from tests.helpers.matrices import save_model
from tests.helpers.running import run


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base → sft → rl, and beside rl another; a stranger."""
    root = tmp_path_factory.mktemp("family")
    base = drawn(0, layers=4)
    sft = tuned(base, 1, Updates(size=0.1))
    made = {"base": base, "sft": sft, "stranger": drawn(9, layers=4)}
    made |= {name: tuned(sft, seed, Updates(size=0.08)) for seed, name in ((2, "rl"), (3, "dpo"))}
    for name, weights in made.items():
        save_model(root / name, weights)
    return root


def test_the_answer_is_a_sentence_and_a_table(family: Path) -> None:
    done = run("lineage", family / "rl", family / "base", family / "sft")
    assert done.code == 0
    lines = done.out.splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines[1:])) <= 80
    assert "PARENT FOUND: it is" in done.out
    assert "SAMPLE 8 of 12 matrices; --all reads the others" in done.out
    (row,) = (line for line in lines if line.startswith("2 "))
    assert "parent" in row


def test_of_more_than_three_a_tree_is_drawn(family: Path) -> None:
    names = ("base", "dpo", "sft", "stranger")
    out = run("lineage", family / "rl", *(family / name for name in names)).out
    names = [re.match(r" *\S (?:\w+/)?\w+", line) for line in out.splitlines()[3:]]
    assert [name[0].replace("family0/", "") for name in names if name][:5] == [
        "1 base",
        "  3 sft",
        "    • rl",
        "    2 dpo",
        "4 stranger",
    ]
    assert len(out.splitlines()) <= 20


def test_quiet_is_the_headline_and_the_codes_end_a_script(family: Path) -> None:
    done = run("lineage", family / "rl", family / "stranger", "-q", "--fail-on", "UNRELATED")
    assert done.out.startswith("NOT MADE FROM THESE: it has nothing of any of them")
    assert len(done.out.splitlines()) == 1
    assert done.code == 3
    both = ("lineage", family / "rl", family / "sft", family / "stranger", "-q", "--fail-on")
    assert run(*both, "TOO_FAR,MERGE").code == 0
    assert run(*both, "PARENT,DESCENDS,relative_update>0.9").err.endswith(
        "--fail-on: PARENT, DESCENDS, relative_update>0.9\n"
    )
    assert run(*both, "NOTHING").code == 2


def test_files_and_json_hold_the_report(family: Path, tmp_path: Path) -> None:
    out = [part for end in ("json", "csv", "md") for part in ("-o", tmp_path / f"r.{end}")]
    done = run("lineage", family / "rl", family / "base", family / "sft", "--json", *out)
    report = read(tmp_path / "r.json")
    assert json.loads(done.out) == report.to_json()
    assert (tmp_path / "r.csv").read_text().count("\n") == 1 + 2 * len(report.coverage.matched)
    page = (tmp_path / "r.md").read_text()
    assert page.startswith("# Lineage: ")
    assert "PARENT FOUND" in page
    shown = run("show", tmp_path / "r.json")
    assert "PARENT FOUND" in shown.out


def test_details_and_reasons(family: Path) -> None:
    words = ("lineage", family / "rl", family / "base", family / "sft")
    assert "growth of ‖W‖² over ‖ΔW‖²" in run(*words, "--details").out
    said = run(*words, "--explain").out
    assert "cos at the parent ≤" in said
    assert "lineage.between" in said
    assert "what decided" not in said
