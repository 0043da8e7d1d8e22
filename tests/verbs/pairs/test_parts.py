"""Are the parts of a comparison, joined, the report of the whole, and is a wrong part refused?"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import geoscope
from geoscope.errors import OptionError, ReportError
from geoscope.records import Report
from geoscope.verbs.pairs.parts import Part, compare_part, join
from tests.helpers.matrices import gaussian, save_model
from tests.helpers.running import run

SHAPES = {"self_attn.q_proj": (48, 40), "mlp.up_proj": (64, 40), "mlp.down_proj": (40, 64)}
OPTIONS = geoscope.Options(ks=(2, 4), include=("proj", "norm"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parts")
    base, tuned = {}, {}
    for i in range(3):
        for j, (name, shape) in enumerate(SHAPES.items()):
            key = f"model.layers.{i}.{name}.weight"
            base[key] = 0.02 * gaussian(*shape, seed=10 * i + j)
            tuned[key] = base[key] + 0.002 * gaussian(*shape, seed=100 + 10 * i + j)
        key = f"model.layers.{i}.input_layernorm.weight"
        base[key], tuned[key] = torch.ones(40), torch.full((40,), 1.01)
    tuned["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    return save_model(root / "base", base), save_model(root / "tuned", tuned)


def timeless(report: Report) -> str:
    return re.sub(r'"seconds": ?[^,}]*', "", report.dumps())


def parts_of(models: tuple[Path, Path], of: int, kind: str = "compare") -> list[Part]:
    parts = (
        compare_part(*models, (number, of), kind=kind, options=OPTIONS)
        for number in range(1, of + 1)
    )
    return [Part.loads(part.dumps()) for part in parts]


@pytest.mark.parametrize(("was", "becomes"), [('"kind": "', '"kind": "x'), ('"sha256"', '"sum"')])
def test_a_part_that_was_changed_is_refused(
    models: tuple[Path, Path], was: str, becomes: str
) -> None:
    text = parts_of(models, 1)[0].dumps()
    assert text.count(was) == 1
    with pytest.raises(ReportError, match=r"changed after it was written.*compute this part again"):
        Part.loads(text.replace(was, becomes))


@pytest.mark.parametrize(("kind", "of"), [("compare", 3), ("collapse", 2), ("capacity", 20)])
def test_joined_parts_are_the_report_of_the_whole(
    models: tuple[Path, Path], kind: str, of: int
) -> None:
    """More parts than matrices, too; one matrix has a NaN."""
    parts = parts_of(models, of, kind)
    whole = geoscope.compare(*models, kind=kind, options=OPTIONS)
    assert timeless(join(parts[::-1])) == timeless(whole)


def test_every_matrix_is_in_one_part_and_work_is_even(models: tuple[Path, Path]) -> None:
    parts = parts_of(models, 3)
    names = [matrix.record.name for part in parts for matrix in part.matrices]
    assert sorted(names) == sorted({*names})
    assert len(names) == 9
    assert all(2 <= len(part.matrices) <= 4 for part in parts)


def test_a_part_that_is_missing_doubled_or_foreign_is_refused(models: tuple[Path, Path]) -> None:
    parts = parts_of(models, 3)
    with pytest.raises(ReportError, match=r"1 of 3 parts are missing: 2; compute them first"):
        join([parts[0], parts[2]])
    with pytest.raises(ReportError, match=r"part 2 of 3 is there twice: b and c"):
        join([*parts[:2], parts[1]], names=["a", "b", "c"])
    for change, what in (
        ({"kind": "collapse"}, "another kind of report"),
        ({"tool_version": "0"}, "another version of geoscope"),
        ({"of": 4}, "another number of parts"),
        ({"options": {**parts[0].options, "seed": 1}}, "other options"),
        ({"about": replace(parts[0].about, tuned=parts[0].about.base)}, "other models"),
    ):
        with pytest.raises(ReportError, match=f"part 2: is of {what} than part 1"):
            join([parts[0], replace(parts[1], **change), parts[2]])


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (-1, 1)])
def test_a_number_that_no_part_has_is_refused(
    models: tuple[Path, Path], part: tuple[int, int]
) -> None:
    with pytest.raises(OptionError, match="write I/N with 1 ≤ I ≤ N"):
        compare_part(*models, part, options=OPTIONS)


def test_parts_and_join_on_the_command_line(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["collapse", *models, "--k", "2,4", "--quiet"]
    files = [tmp_path / f"{number}.json" for number in (1, 2)]
    for number, file in enumerate(files, 1):
        done = run(*words, "--part", f"{number}/2", "-o", file)
        assert done.code == 0, done.err
        assert f"part {number} of 2" in done.out
    joined = run("join", *files, "--json")
    assert joined.code == 0, joined.err
    whole = run(*words, "--json")
    without = [
        re.sub(r'"(seconds|argv)": ?(\[[^]]*\]|[^,}]*)', "", one.out) for one in (joined, whole)
    ]
    assert without[0] == without[1]
    for bad, why in (
        (["--part", "1"], "write I/N"),
        (["--part", "1/2"], "give -o FILE.json"),
        (["--part", "1/2", "-o", tmp_path / "x.csv"], "give -o FILE.json"),
        (["--part", "1/2", "-o", tmp_path / "x.json", "--strict"], "gives no verdict"),
    ):
        done = run(*words, *bad)
        assert done.code in (1, 2)
        assert why in done.err
    done = run("join", tmp_path / "nothing.json")
    assert (done.code, done.err.count("\n")) == (1, 1)
