"""The analysis of the study: its statistics against other ones, and its tables from the CSV."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu

from benchmarks.study.analyse import filled
from benchmarks.study.figures import write_figures
from benchmarks.study.outcomes import Study, study_of
from benchmarks.study.prediction import lines
from benchmarks.study.resampling import (
    auc,
    estimate,
    largest_by_chance,
    left_out,
    ranks,
    resamples,
)
from benchmarks.study.second import disagreements
from benchmarks.study.standing import standings
from benchmarks.study.tables import TABLES, results_of
from geoscope.metrics import THRESHOLDS
from tests.helpers.pages import DOCS, ROOT

TABLE = ROOT / "benchmarks" / "study"


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(5)


def test_auc_is_that_of_mann_and_whitney(noise: np.random.Generator) -> None:
    scores, failed = noise.integers(0, 6, 50).astype(float), noise.random(50) < 0.4
    u = mannwhitneyu(scores[failed], scores[~failed]).statistic
    area = auc(scores, failed)
    assert area == pytest.approx(u / (failed.sum() * (~failed).sum()))
    assert auc(scores, np.zeros(50, dtype=bool)) is None


def test_intervals_hold_the_truth_as_often_as_they_say(noise: np.random.Generator) -> None:
    failed = np.arange(60) < 20
    counts, hits = resamples(range(60), draws=400), 0
    for _ in range(200):
        interval = estimate(noise.standard_normal(60) + failed, failed, counts)
        hits += interval.above < 0.760 < interval.below  # Φ(1/√2)
    assert 180 <= hits <= 198


def test_whole_groups_are_drawn_together() -> None:
    counts = resamples(["a", "a", "b", "c", "c"], draws=20)
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 3] == counts[:, 4]).all()
    assert {tuple(row) for row in counts[:, [0, 2, 3]].astype(int)} != {(1, 1, 1)}


def test_predictions_are_of_the_penalised_fit_on_the_other_groups(
    noise: np.random.Generator,
) -> None:
    inputs, failed = noise.standard_normal((40, 2)), noise.random(40) < 0.5
    groups = np.repeat(["a", "b"], 20)
    scores = left_out(inputs, failed, groups)
    X, y = inputs[20:], failed[20:].astype(float)

    def loss(w: np.ndarray) -> float:
        z = w[0] + X @ w[1:]
        return float((np.logaddexp(0, z) - y * z).sum() + 0.5 * (w[1:] ** 2).sum())

    w = minimize(loss, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose(scores[:20], w[0] + inputs[:20] @ w[1:], atol=1e-4)


def test_undefined_statistics_take_the_middle_rank() -> None:
    scores = ranks(np.array([3.0, np.nan, 1.0, 2.0]))
    assert scores[1] == scores[3] == 0 and scores[0] == -scores[2] > 0


def test_the_bar_of_chance_is_passed_by_noise_in_one_case_of_twenty(
    noise: np.random.Generator,
) -> None:
    failed, blocks = np.arange(40) % 3 == 0, np.repeat(["a", "b"], 20)
    passed = 0
    for _ in range(60):
        table = [noise.standard_normal(40) for _ in range(8)]
        areas = [auc(values, failed) or 0.5 for values in table]
        bar = largest_by_chance(table, failed, blocks, draws=200)
        passed += max(abs(area - 0.5) for area in areas) > bar
    assert passed <= 9


def study_of_noise(noise: np.random.Generator, signal: float) -> Study:
    """Sixty runs of three methods, in which `told` knows the outcome as far as signal says."""
    runs, rows = [], {}
    for place in range(60):
        name, failed = f"run-{place}", place % 2
        runs.append(
            {
                "name": name,
                "method": ("full", "dora", "rlpo")[place % 3],
                "rate": "0.1",
                "task": "t",
                "kl": "0",
            }
            | {"seed": str(place // 30), "finite": str(1 - failed), "entropy_0": "1"}
            | {f"accuracy_{step}": "0.5" for step in range(0, 121, 10)}
            | {f"entropy_{step}": "1" for step in (30, 120)}
        )
        told = signal * failed + noise.standard_normal()
        numbers = {"relative_update": str(noise.random()), "told": str(told)}
        rows |= {(name, step): numbers for step in (30, 120)}
    return Study(tuple(runs), rows)


@pytest.mark.parametrize(("signal", "adds"), [(0.0, False), (2.0, True)])
def test_what_tells_the_outcome_adds_and_noise_does_not(
    signal: float, adds: bool, noise: np.random.Generator
) -> None:
    table = {line.name: line for line in lines(study_of_noise(noise, signal), 120)}
    told = table["told"]
    assert (told.auc.above > 0.5) is adds
    assert all((gain.above > 0) is adds for gain in told.adds.values())


def small_tables(folder: Path, runs: int, columns: list[str]) -> None:
    """The first runs of each method, and some columns of their statistics."""
    with (TABLE / "runs.csv").open(encoding="utf-8", newline="") as file:
        all_runs = list(csv.DictReader(file))
    kept = all_runs[:runs]
    names = {row["name"] for row in kept}
    for file_name, fields in (
        ("runs.csv", list(kept[0])),
        ("statistics.csv", columns),
        ("extrapolation.csv", None),
    ):
        with (TABLE / file_name).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["name"] in names]
        with (folder / file_name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fields or list(rows[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


COLUMNS = [
    *("name", "step", "verdict.compare", "relative_update", "energy_two_sided@8", "lift@8"),
    *("nss/null", "nss", "beyond.distorted.nss"),
]


@pytest.mark.slow
def test_both_analyses_and_the_figures_are_made_of_a_small_part_of_the_csv(tmp_path: Path) -> None:
    small_tables(tmp_path, 50, COLUMNS)
    study = study_of(tmp_path)
    results = results_of(study, tmp_path)
    page = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in TABLES)
    page = filled(page, results)
    tables = dict(re.findall(r"<!-- table: (\w+) -->\n\n(.*?)\n\n<!-- end", page, re.DOTALL))
    assert tables.keys() == TABLES.keys()
    counts = tables["runs"].splitlines()[-1].split("|")[4:8]
    assert sum(map(int, counts)) == len(study.runs) == 50
    write_figures(results, tmp_path)
    assert len(list(tmp_path.glob("study-*.svg"))) == 3
    wrong = re.sub(r"(`nss` \|) [\d.]+ ", r"\1 .37 ", tables["all"])
    said = disagreements(tmp_path, page.replace(tables["all"], wrong))
    assert [line[:20] for line in said] == ["all, step 30: nss .3"]


def test_the_tables_are_small_and_every_run_is_there() -> None:
    assert sum(file.stat().st_size for file in TABLE.glob("*.csv")) < 1_000_000
    study = study_of(TABLE)
    assert len(study.runs) >= 80
    steps = {step for _, step in study.rows}
    assert study.rows.keys() == {(row["name"], step) for row in study.runs for step in steps}


def test_limits_say_what_the_study_says_of_them() -> None:
    for each in standings(study_of(TABLE)):
        assert each.words.removeprefix("study, ") in THRESHOLDS[each.name].standing, each.name


@pytest.mark.slow
def test_a_second_analysis_agrees_with_the_page() -> None:
    assert disagreements(TABLE, (DOCS / "study.md").read_text(encoding="utf-8")) == []


@pytest.mark.slow
def test_the_tables_of_the_page_are_those_of_the_csv() -> None:
    text = (DOCS / "study.md").read_text(encoding="utf-8")
    assert filled(text, results_of(study_of(TABLE), TABLE)) == text
