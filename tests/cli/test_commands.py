"""What each command says, writes and returns; what is refused, when, and in which words."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from geoscope.report import SUFFIXES, read
from tests.helpers.matrices import save_model
from tests.helpers.running import Done, Weights, by_rows, process, run, weights, write_pair

Models = dict[str, Path]

COMPARING = ("collapse", "anisotropy", "alignment", "compare")
every_comparison = pytest.mark.parametrize("command", COMPARING)
Q0 = "model.layers.0.self_attn.q_proj.weight"
DOWN0 = "model.layers.0.mlp.down_proj.weight"
MATRICES = 4


def without_volatile(report: dict[str, Any]) -> dict[str, Any]:
    provenance = {k: v for k, v in report["provenance"].items() if k not in ("seconds", "argv")}
    return {**report, "provenance": provenance}


def one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1 and text.startswith("geoscope: ")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "geoscope-cache")


# --- what a command shows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("collapse", ["OFF_PRINCIPAL", "spectral share NSS/ρ", "effective rank ratio"]),
        ("anisotropy", ["stable rank", "effective rank", "k90"]),
        ("alignment", ["captured C_LR(", "mean angle left", "gap of the base"]),
        ("compare", ["OFF_PRINCIPAL", "stable rank", "captured C_LR(", "spectral share"]),
    ],
)
def test_comparisons_show_their_families(models: Models, command: str, words: list[str]) -> None:
    done = run(command, models["base"], models["tuned"], "--details")
    assert done.code == 0
    for word in words:
        assert word in done.out
    assert "COMPLETE 4 of 4 matrices" in done.out
    assert done.err.splitlines()[0].startswith("comparing 4 matrices of")


def test_output_to_a_pipe_is_plain_and_narrow(models: Models) -> None:
    pair = models["base"], models["tuned"]
    done = process("compare", *pair, COLUMNS="200", TERM="xterm-256color")
    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    assert not re.search("[\u2500-\u257f\u2580-\u259f]", done.out + done.err)  # boxes, bars
    assert max(map(len, done.out.splitlines())) <= 80


@every_comparison
def test_json_is_one_document_and_equals_the_file(
    models: Models, command: str, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    done = run(command, models["base"], models["tuned"], "--json", "-o", out)
    assert done.code == 0
    assert json.loads(done.out) == json.loads(out.read_text())
    assert done.report["schema"] == "geoscope.report/2"
    assert done.report["kind"] == command
    assert len(done.report["layers"]) == MATRICES
    assert read(out).to_json() == json.loads(done.out)


@every_comparison
def test_two_runs_differ_in_seconds_and_argv_only(models: Models, command: str) -> None:
    first = run(command, models["base"], models["tuned"], "--json", "--no-resume")
    second = run(command, models["base"], models["tuned"], "--json", "--no-resume", "-j", "1")
    assert first.report["provenance"]["argv"] != second.report["provenance"]["argv"]
    assert without_volatile(first.report) == without_volatile(second.report)


def test_json_on_stdout_is_the_same_beside_any_file(models: Models, tmp_path: Path) -> None:
    alone = run("collapse", models["base"], models["tuned"], "--json")
    beside = run("collapse", models["base"], models["tuned"], "--json", "-o", tmp_path / "r.csv")
    assert without_volatile(alone.report) == without_volatile(beside.report)


@pytest.mark.parametrize("command", ["compare", "alignment"])
def test_several_tuned_models_stand_side_by_side(models: Models, command: str) -> None:
    done = run(command, models["base"], models["tuned"], models["other"], "--json")
    report = done.report
    assert done.code == 0
    assert [one["given"] for one in report["provenance"]["refs"]] == [
        str(models[name]) for name in ("base", "tuned", "other")
    ]
    assert [one["tuned"] for one in report["summary"]["runs"]] == [1, 2]
    assert len(report["layers"]) == 2 * MATRICES
    text = run(command, models["base"], models["tuned"], models["other"], "--details").out
    assert "tuned" in text
    assert "other" in text


@pytest.mark.parametrize("command", ["collapse", "anisotropy"])
def test_one_tuned_model_is_enough_for_the_others(models: Models, command: str) -> None:
    assert run(command, models["base"], models["tuned"], models["other"]).code == 2


def test_verbose_lists_every_matrix_and_how(models: Models) -> None:
    text = run("compare", models["base"], models["tuned"], "--verbose").out
    for name in weights():
        if "proj" in name:
            assert name.removesuffix(".weight") in text


@pytest.mark.parametrize("solver", ["auto", "exact"])
def test_verbose_says_by_which_method_and_how_well(models: Models, solver: str) -> None:
    report = run("compare", models["base"], models["tuned"], "--json", "--solver", solver)
    how = report.layer(Q0)["method"]["base.S"]["how"]
    assert how == ("svd" if solver == "exact" else "gram-eigh")
    text = run("compare", models["base"], models["tuned"], "-v", "--solver", solver).out
    rows = text.partition("how each matrix was computed")[2].partition("\n\n")[0]
    for role in ("base", "tuned", "update"):
        assert role in rows
    assert how in rows
    bounds = [one["bound"] for one in report.layer(Q0)["method"].values()]
    assert f"{max(bounds):.1e}" in rows
    assert "how each matrix" not in run("compare", models["base"], models["tuned"], "--details").out


def test_explain_shows_thresholds_with_their_standing(models: Models) -> None:
    plain = run("collapse", models["base"], models["tuned"]).out
    told = run("collapse", models["base"], models["tuned"], "--explain").out
    assert len(told.splitlines()) > len(plain.splitlines()) + 15
    for word in ("distorted.nss", ".0500", "rank_collapse.top_share", "2606.07082", "ours"):
        assert word in told


def test_explain_shows_the_clause_of_each_matrix_in_a_pipe(models: Models) -> None:
    done = run("collapse", models["base"], models["tuned"], "--explain")
    told = " ".join(done.out.partition("what decided")[2].partition("\n\n")[0].split())
    rows = run("collapse", models["base"], models["tuned"], "--json").report["layers"]
    for row in rows:
        captured = row["verdict"]["clause"].partition(" and ")[0]
        assert captured in told
    assert len(rows) == told.count("°") / 2  # the angle and its limit, in degrees


def test_dimensions_that_say_nothing_are_in_the_json_and_with_verbose(models: Models) -> None:
    text = run("compare", models["base"], models["tuned"], "--details").out
    assert "left out: k = 8, 64, above an eighth of every shorter side" in text
    assert "captured C_LR(3)" in text  # the verdict's own
    assert "captured C_LR(8)" not in text
    assert "captured C_LR(8)" in run("compare", models["base"], models["tuned"], "-v").out
    report = run("compare", models["base"], models["tuned"], "--json").report
    assert report["summary"]["model"]["energy_two_sided@8"] is not None


def test_masks_and_curves_add_their_ids(models: Models) -> None:
    plain = run("compare", models["base"], models["tuned"], "--json")
    more = run("compare", models["base"], models["tuned"], "--json", "--masks", "--curves")
    added = set(more.report["summary"]["model"]) - set(plain.report["summary"]["model"])
    assert {"mask_overlap_low", "mask_lift_low", "outside_span", "auc_right", "auc_left"} <= added
    shared = plain.report["summary"]["model"]
    for key, value in more.report["summary"]["model"].items():
        if value is not None and key in shared:
            assert value == pytest.approx(shared[key], rel=1e-9), key


# --- files --------------------------------------------------------------------------------------

SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".md": b"#", ".json": b"{"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_written(models: Models, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"report{suffix}"
    done = run("collapse", models["base"], models["tuned"], "-o", out)
    assert done.code == 0
    assert f"wrote {out}" in done.err
    assert names_in(tmp_path) == [out.name]
    content = out.read_bytes()
    assert content.startswith(SIGNATURES.get(suffix, b""))
    if suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(content.decode())))
        assert len(rows) == MATRICES
        assert rows[0]["name"] == DOWN0


def test_several_files_hold_the_same_numbers(models: Models, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.csv", "c.md")]
    options = [part for path in files for part in ("-o", path)]
    assert run("collapse", models["base"], models["tuned"], *options).code == 0
    assert names_in(tmp_path) == [path.name for path in files]
    layers = by_rows(json.loads(files[0].read_text()))["layers"]
    rows = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert [one["name"] for one in rows] == [one["name"] for one in layers]
    assert float(rows[0]["relative_update"]) == layers[0]["values"]["relative_update"]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("geoscope.verbs.pairs.compare.compare", compare)


def refuse(done: Done, code: int, words: str) -> None:
    assert (done.code, done.out) == (code, "")
    assert one_line(done.err), done.err
    assert re.search(words, done.err), done.err


@pytest.mark.usefixtures("no_work")
@every_comparison
def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    models: Models, command: str, tmp_path: Path
) -> None:
    def attempt(*outputs: Path, force: bool = False) -> Done:
        options = [part for path in outputs for part in ("-o", path)]
        if force:
            options.append("--force")
        return run(command, models["base"], models["tuned"], *options)

    refuse(attempt(tmp_path / "report.xlsx"), 2, r"\.xlsx.*\.json, \.html, \.csv")
    refuse(attempt(tmp_path / "report"), 2, "no report format")
    refuse(attempt(tmp_path / "missing" / "report.json"), 1, "does not exist")
    refuse(attempt(tmp_path / "good.json", tmp_path / "bad.doc"), 2, r"bad\.doc")
    there = tmp_path / "there.json"
    there.write_text("mine")
    refuse(attempt(there), 2, "--force")
    refuse(attempt(tmp_path, force=True), 2, "no report format")
    assert there.read_text() == "mine"
    assert names_in(tmp_path) == ["there.json"]


@pytest.mark.usefixtures("no_work")
def test_a_folder_without_write_permission_is_refused_before_the_work(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and allowed(path, mode))
    done = run("collapse", models["base"], models["tuned"], "-o", tmp_path / "report.json")
    refuse(done, 1, "not writable")
    assert names_in(tmp_path) == []


def test_force_overwrites(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    out.write_text("old")
    assert run("collapse", models["base"], models["tuned"], "-o", out, "--force").code == 0
    assert read(out).kind == "collapse"


# --- what is looked at --------------------------------------------------------------------------


def shown(done: Done) -> list[str]:
    assert done.code == 0, done.err
    return [one["name"].removeprefix("model.") for one in done.report["layers"]]


def test_include_exclude_and_layers_choose(models: Models) -> None:
    def rows(*options: str) -> list[str]:
        return shown(run("collapse", models["base"], models["tuned"], "--json", *options))

    q, down = "self_attn.q_proj.weight", "mlp.down_proj.weight"
    everything = [f"layers.{i}.{name}" for i in (0, 1) for name in (down, q)]
    assert rows() == everything
    assert rows("--include", "q_proj") == [f"layers.{i}.{q}" for i in (0, 1)]
    assert rows("-i", "q_proj", "-i", r"0.*down") == [
        f"layers.0.{down}", f"layers.0.{q}", f"layers.1.{q}",
    ]  # fmt: skip
    assert rows("--exclude", "q_proj", "-e", r"layers\.1") == [f"layers.0.{down}"]
    assert rows("--layers", "1") == [f"layers.1.{name}" for name in (down, q)]
    assert rows("--layers", "0-1,7") == everything
    assert rows("--include", "embed|q_proj", "--layers", "1") == [f"layers.1.{q}"]
    assert rows("--include", "embed") == ["embed_tokens.weight"]


def test_what_is_left_out_is_listed_with_its_reason(models: Models) -> None:
    done = run("collapse", models["base"], models["tuned"], "--json", "--exclude", "q_proj")
    reasons = {one["name"]: one["reason"] for one in done.report["coverage"]["skipped"]}
    assert reasons[Q0] == "excluded by --exclude"
    assert "--include reaches it" in reasons["model.embed_tokens.weight"]
    assert done.report["coverage"]["status"] == "COMPLETE"


def test_k_adds_columns_and_never_moves_the_verdict(models: Models) -> None:
    def verdicts(text: str) -> tuple[Any, Any, set[str]]:
        report = run("compare", models["base"], models["tuned"], "--json", "--k", text).report
        rows = [one["verdict"] for one in report["layers"]]
        model = report["summary"]["verdict"]
        for entry in model["explain"]:  # ranges of values, which carry the last digit
            entry["least"], entry["largest"] = (f"{entry[x]:.9g}" for x in ("least", "largest"))
        return model, rows, set(report["layers"][0]["values"])

    model, rows, few = verdicts("1")
    for text, columns in (("8,64", {"lift@8", "lift@64"}), ("5,20,2", {"gap@2", "gap@20"})):
        other_model, other_rows, ids = verdicts(text)
        assert other_model == model
        assert other_rows == rows
        assert columns <= ids
        assert not columns & few
    assert {one["k"] for one in rows} == {3}
    assert "lift@3" in few


@pytest.mark.usefixtures("no_work")
def test_anisotropy_has_no_dimensions_to_choose(models: Models) -> None:
    done = run("anisotropy", models["base"], models["tuned"], "--k", "8")
    assert done.code == 2
    assert "--k" in done.err
    assert "--k" not in run("anisotropy", "--help").out


def test_a_dimension_beyond_the_matrix_is_null_and_not_cut(models: Models) -> None:
    row = run("compare", models["base"], models["tuned"], "--json", "--k", "24,25").layer(Q0)
    assert row["values"]["lift@24"] == pytest.approx(1.0)
    assert row["values"]["lift@25"] is None
    assert row["status"]["lift@25"] == "NOT_APPLICABLE"
    assert row["status"]["angle_left_mean@24"] == "NOT_APPLICABLE"  # a complete basis


@pytest.mark.usefixtures("no_work")
@every_comparison
def test_dry_run_computes_and_writes_nothing(models: Models, command: str, tmp_path: Path) -> None:
    done = run(command, models["base"], models["tuned"], "--dry-run", "-o", tmp_path / "r.json")
    assert done.code == 0
    for words in ("4 matrices correspond", "would read 24.6 kB", "would take", "left out"):
        assert words in done.out
    assert names_in(tmp_path) == []
    assert not list(tmp_path.rglob("*.json"))


def test_dry_run_as_json(models: Models) -> None:
    found = run("compare", models["base"], models["tuned"], "--dry-run", "--json").report
    assert found["schema"] == "geoscope.inspect/1"
    assert len(found["matrices"]) == MATRICES


# --- exit codes ---------------------------------------------------------------------------------


def drop(name: str) -> Callable[[Weights], None]:
    def change(tuned: Weights) -> None:
        del tuned[name]

    return change


def poison(name: str, value: float) -> Callable[[Weights], None]:
    def change(tuned: Weights) -> None:
        tuned[name][3, 5] = value

    return change


@every_comparison
def test_strict_asks_for_every_matrix(command: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, drop(Q0))
    lenient = run(command, *pair, "--json")
    assert lenient.code == 0
    assert lenient.report["coverage"]["status"] == "PARTIAL"
    assert lenient.report["coverage"]["missing"] == [Q0]
    assert len(lenient.report["layers"]) == MATRICES - 1
    strict = run(command, *pair, "--strict")
    assert strict.code == 1
    assert f"--strict: 1 matrices not compared: {Q0}" in strict.err
    assert f"PARTIAL 1 of 4 matrices not compared: {Q0}" in strict.out


def test_strict_is_content_with_a_complete_pair(models: Models) -> None:
    assert run("collapse", models["base"], models["tuned"], "--strict").code == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@every_comparison
def test_a_broken_tensor_is_named_and_the_rest_is_computed(
    command: str, bad: float, tmp_path: Path
) -> None:
    pair = write_pair(tmp_path, poison(Q0, bad))
    done = run(command, *pair, "--json")
    assert done.code == 0
    row = done.layer(Q0)
    assert set(row["values"].values()) == {None}
    assert set(row["status"].values()) == {"NON_FINITE"}
    assert row["notes"] == ["1 entries are NaN or Inf"]
    others = [one for one in done.report["layers"] if one["name"] != Q0]
    assert len(others) == MATRICES - 1
    assert all(one["values"]["relative_update"] is not None for one in others)
    assert done.report["coverage"]["missing"] == [Q0]
    assert run(command, *pair, "--strict").code == 1


def test_the_rest_of_the_model_is_as_if_the_broken_tensor_were_excluded(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, poison(Q0, float("nan")))
    broken = run("compare", *pair, "--json").report
    without = run("compare", *pair, "--json", "--exclude", r"layers\.0\.self_attn").report
    assert broken["summary"]["model"] == without["summary"]["model"]
    for key in ("code", "share", "flagged"):
        assert broken["summary"]["verdict"][key] == without["summary"]["verdict"][key]
    assert broken["summary"]["verdict"]["counts"] == {"OFF_PRINCIPAL": 3, "UNDETERMINED": 1}


@every_comparison
def test_identical_checkpoints_are_no_update(models: Models, command: str) -> None:
    done = run(command, models["base"], models["same"], "--json")
    assert done.code == 0
    assert done.report["summary"]["model"]["relative_update"] == 0
    assert done.report["layers"][0]["status"]["precision_ratio"] == "ZERO_UPDATE"
    if "verdict" in done.report["summary"]:
        assert done.report["summary"]["verdict"]["code"] == "NO_UPDATE"
        assert {one["verdict"]["code"] for one in done.report["layers"]} == {"NO_UPDATE"}
    assert run(command, models["base"], models["same"]).code == 0


@every_comparison
def test_nothing_comparable_is_an_error(models: Models, command: str, tmp_path: Path) -> None:
    renamed = {f"net.{i}": weight for i, weight in enumerate(weights().values())}
    strange = save_model(tmp_path / "strange", renamed)
    refuse(run(command, models["base"], strange), 1, "nothing to compare")
    excluded = run(command, models["base"], models["tuned"], "--exclude", ".")
    refuse(excluded, 1, "nothing to compare")


def test_only_broken_matrices_are_nothing_compared(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, poison(Q0, float("nan")))
    done = run("collapse", *pair, "--include", re.escape(Q0), "--details")
    assert done.code == 1
    assert "no matrix could be compared" in done.err
    assert "NON_FINITE" in done.out


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("OFF_PRINCIPAL", 3),
        ("ON_PRINCIPAL", 0),
        ("OFF_PRINCIPAL>0.9", 3),
        ("OFF_PRINCIPAL>1", 0),
        ("RANK_COLLAPSE>0", 0),
        ("relative_update>0.01", 3),
        ("relative_update>0.03", 0),
        ("update.stable_rank<20", 3),
        ("update.stable_rank<2", 0),
        ("lift@8 > 1e-3", 3),
        ("ON_PRINCIPAL,relative_update>1,nss<1", 3),
        ("ON_PRINCIPAL,relative_update>1", 0),
    ],
)
def test_fail_on(models: Models, expression: str, code: int) -> None:
    done = run("compare", models["base"], models["tuned"], "--fail-on", expression)
    assert done.code == code
    assert ("--fail-on" in done.err) == (code == 3)
    assert "OFF_PRINCIPAL" in done.out  # the report is shown either way


def test_fail_on_a_number_works_without_a_verdict(models: Models) -> None:
    arguments = ("anisotropy", models["base"], models["tuned"], "--fail-on")
    assert run(*arguments, "relative_update>0.01").code == 3
    assert run(*arguments, "relative_update>0.1").code == 0


def test_fail_on_looks_at_each_of_several_models(models: Models) -> None:
    pair = ("compare", models["base"], models["small"], models["tuned"])
    assert run(*pair, "--fail-on", "relative_update>0.01").code == 3
    assert run(*pair, "--fail-on", "relative_update<0.005").code == 3
    assert run(*pair, "--fail-on", "relative_update>0.1").code == 0


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("command", "expression", "words"),
    [
        ("compare", "COLLAPSED", "the codes are"),
        ("compare", "OFF_PRINCIPAL<0.5", "with > only"),
        ("compare", "relative_update", "needs > or <"),
        ("compare", "relative_updat>1", "has no"),
        ("compare", "relative_update>much", "write CODE"),
        ("compare", "relative_update>1e", "is not a number"),
        ("compare", "relative_update>=1", "write CODE"),
        ("compare", "", "write CODE"),
        ("compare", "OFF_PRINCIPAL,", "write CODE"),
        ("anisotropy", "OFF_PRINCIPAL", "has no verdict"),
        ("anisotropy", "lift@8>1", "has no"),
        ("alignment", "nss>1", "has no"),
        ("compare", "lift@65>1", "lift@"),
    ],
)
def test_conditions_that_could_never_hold_are_refused(
    models: Models, command: str, expression: str, words: str
) -> None:
    refuse(run(command, models["base"], models["tuned"], "--fail-on", expression), 2, words)


def test_incomplete_under_strict_outweighs_a_condition_that_holds(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, drop(Q0))
    assert run("collapse", *pair, "--strict", "--fail-on", "relative_update>0").code == 1


@pytest.mark.parametrize(
    ("limit", "code", "name", "value"),
    [
        ("distorted.nss=1e-9", "SPECTRUM_DISTORTED", "distorted.nss", 1e-9),
        ("off_principal.energy_two_sided = 0", "MIXED", "off_principal.energy_two_sided", 0.0),
        ("rank_collapse.top_share=.01", "RANK_COLLAPSE", "rank_collapse.top_share", 0.01),
        ("distorted.angle=0.5", "OFF_PRINCIPAL", "distorted.angle", 0.5),
        ("distorted.angle=15deg", "OFF_PRINCIPAL", "distorted.angle", math.radians(15)),
        ("distorted.angle=15°", "OFF_PRINCIPAL", "distorted.angle", math.radians(15)),
    ],
)
@pytest.mark.parametrize("command", ["collapse", "compare"])
def test_limits_are_overridden_by_name(
    models: Models, command: str, limit: str, code: str, name: str, value: float
) -> None:
    plain = run(command, models["base"], models["tuned"], "--json").report
    assert plain["summary"]["verdict"]["code"] == "OFF_PRINCIPAL"
    verdict = run(command, models["base"], models["tuned"], "--json", "--limit", limit).report[
        "summary"
    ]["verdict"]
    assert verdict["code"] == code
    assert verdict["thresholds"] == {**plain["summary"]["verdict"]["thresholds"], name: value}


def test_limits_are_shown_by_the_names_that_are_taken(models: Models) -> None:
    arguments = ("collapse", models["base"], models["tuned"])
    limits = ("--limit", "distorted.nss=0.25", "--limit", "distorted.angle=15deg")
    told = run(*arguments, "--explain", *limits).out
    names = [line.split() for line in told.splitlines() if line.startswith("distorted.")]
    assert ["distorted.nss", ".250"] in names
    assert ["distorted.angle", "15.0°"] in names
    for name, _ in names:
        assert run(*arguments, "--limit", f"{name}=0.5", "--dry-run").code == 0


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("distorted.nss", "NAME=VALUE"),
        ("distorted=1", "no threshold 'distorted'; near: distorted.nss, "),
        ("nss=1", "no threshold 'nss'; near: distorted.nss$"),
        ("x=1", "no threshold 'x'; they are unrelated.cosine, "),
        ("distorted.nss=much", "'much' is not a number"),
        ("distorted.nss=nan", "'nan' is not a number"),
        ("distorted.nss=", "'' is not a number"),
        ("distorted.angle=15", "15deg"),
        ("distorted.nss=15deg", "is not a number"),
    ],
)
def test_limits_that_are_none_are_refused_before_the_work(
    models: Models, limit: str, words: str
) -> None:
    refuse(run("collapse", models["base"], models["tuned"], "--limit", limit), 2, words)


# --- anchor, quiet, names of files --------------------------------------------------------------


@pytest.mark.parametrize("command", ["collapse", "compare"])
def test_anchor_gives_ratios(models: Models, command: str) -> None:
    done = run(command, models["base"], models["small"], "--anchor", models["tuned"], "--json")
    anchor = done.report["summary"]["anchor"]
    assert anchor["ref"]["given"] == str(models["tuned"])
    assert anchor["ratios"]["relative_update"] == pytest.approx(0.2, rel=1e-3)
    assert anchor["spectrum_preserving"] is True
    itself = run(command, models["base"], models["tuned"], "--anchor", models["tuned"], "--json")
    ratios = itself.report["summary"]["anchor"]["ratios"]
    assert {value for value in ratios.values() if value is not None} == {1.0}
    assert itself.report["summary"]["anchor"]["spectrum_preserving"] is False
    alone = run(command, models["base"], models["small"], "--json").report["summary"]
    assert {**done.report["summary"], "anchor": 0} == {**alone, "anchor": 0}
    anchored = command, models["base"], models["small"], "--anchor", models["tuned"]
    answer = " ".join(run(*anchored).out.split())
    assert "The update is spectrum-preserving beside the anchor" in answer
    text = run(*anchored, "--details").out
    block = text.partition("against the anchor")[2].partition("\n\n")[0]
    assert len(block.splitlines()) < 16  # a long path takes lines of its own
    assert "The update is spectrum-preserving beside the anchor" in block
    (row,) = (line for line in block.splitlines() if line.startswith("relative update"))
    assert row.endswith(" .20×")
    assert "gap" not in block
    assert "intruders" not in block


@every_comparison
def test_quiet_is_the_headline_and_nothing_on_stderr(
    models: Models, command: str, tmp_path: Path
) -> None:
    loud = run(command, models["base"], models["tuned"])
    quiet = run(command, models["base"], models["tuned"], "--quiet", "-o", tmp_path / "r.json")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out.count("\n") == 1
    assert " ".join(quiet.out.split()) in " ".join(loud.out.split())
    details = run(command, models["base"], models["tuned"], "--quiet", "--details")
    assert details.out == run(command, models["base"], models["tuned"], "--details").out


def test_quiet_still_says_what_explains_the_exit_code(models: Models, tmp_path: Path) -> None:
    pair = models["base"], models["tuned"]
    done = run("collapse", *pair, "--quiet", "--fail-on", "relative_update>0")
    assert (done.code, done.err) == (3, "geoscope: --fail-on: relative_update>0\n")
    incomplete = run("collapse", *write_pair(tmp_path, drop(Q0)), "--quiet", "--strict")
    assert incomplete.code == 1
    assert incomplete.err == f"geoscope: --strict: 1 matrices not compared: {Q0}\n"
    assert "exit code" in " ".join(run("collapse", "--help").out.split())


def test_notes_name_their_model_and_are_said_once(models: Models) -> None:
    base, tuned, other = (models[name] / "model.safetensors" for name in ("base", "tuned", "other"))
    done = run("compare", base, tuned, other)
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert [line.partition(": one file, ")[0] for line in notes] == [
        f"note: {path}" for path in (base, tuned, other)
    ]


def test_an_error_is_said_even_under_quiet(models: Models) -> None:
    refuse(run("collapse", models["base"], "nowhere/at/all", "--quiet"), 1, "nowhere")


@pytest.mark.parametrize(
    "folders", [("a b", "c  d"), ("模型", "größe β"), ("[x]*?", "tab\tbed"), ("-dash", "%s{}")]
)
def test_paths_with_spaces_and_non_ascii(folders: tuple[str, str], tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, names=folders)
    out = tmp_path / f"{folders[1]} é.json"
    done = run("collapse", base, tuned, "--json", "-o", out)
    assert done.code == 0, done.err
    assert [one["given"] for one in done.report["provenance"]["refs"]] == [str(base), str(tuned)]
    assert read(out).to_json() == json.loads(done.out)


@pytest.mark.parametrize(("encoding", "options"), [("ascii", ["--json"]), ("latin-1", [])])
def test_what_the_terminal_cannot_show_is_escaped(
    encoding: str, options: list[str], tmp_path: Path
) -> None:
    base, tuned = write_pair(tmp_path, names=("modèle", os.fsdecode(b"gr\xff\xc3\xb6")))
    done = process("anisotropy", base, tuned, *options, encoding=encoding)
    assert done.code == 0, done.err
    if options:
        refs = done.report["provenance"]["refs"]
        assert [one["given"] for one in refs] == [str(base), str(tuned)]
    else:
        assert "modèle" in done.out
        assert "weights (\\u03c1)" in done.out


# --- input that is not good ----------------------------------------------------------------------


def garbage(tmp_path: Path) -> Path:
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "model.safetensors").write_bytes(b"not a checkpoint at all")
    return tmp_path / "garbage"


@every_comparison
def test_bad_models_are_one_line_and_exit_1(models: Models, command: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for bad in (tmp_path / "missing", empty, garbage(tmp_path)):
        refuse(run(command, models["base"], bad), 1, re.escape(str(bad)))
        refuse(run(command, bad, models["tuned"]), 1, re.escape(str(bad)))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k", "a"], "--k"),
        (["--k", "0"], "--k"),
        (["--k", ""], "--k"),
        (["--layers", "3-1"], "backwards"),
        (["--layers", "x"], "--layers"),
        (["--solver", "magic"], "--solver"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    models: Models, options: list[str], words: str
) -> None:
    refuse(run("collapse", models["base"], models["tuned"], *options), 2, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--include", "("], "--include.*regular expression"),
        (["--exclude", "*"], "--exclude.*regular expression"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--dtype", "bfloat16"], "--dtype"),
        (["--max-memory", "lots"], "--max-memory"),
        (["--max-memory", "4XB"], "--max-memory"),
    ],
)
def test_options_that_need_the_headers_are_one_line_and_exit_2(
    models: Models, options: list[str], words: str
) -> None:
    refuse(run("collapse", models["base"], models["tuned"], *options), 2, words)


@pytest.mark.parametrize(
    "arguments", [[], ["collapse"], ["collapse", "a"], ["nonsense"], ["collapse", "a", "b", "--x"]]
)
def test_usage_errors_exit_2_without_a_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(models: Models, tmp_path: Path) -> None:
    arguments = ("collapse", models["base"], tmp_path / "missing")
    assert "Traceback" not in run(*arguments).err
    assert "Traceback" in run(*arguments, "--debug").err


# --- inspect, show, metrics, demo ---------------------------------------------------------------


def test_inspect_one_model(models: Models) -> None:
    done = run("inspect", models["base"])
    assert done.code == 0
    assert "4 matrices in scope" in done.out
    assert "would take" not in done.out
    found = run("inspect", models["base"], "--json").report
    assert found["schema"] == "geoscope.inspect/1"
    assert [one["name"] for one in found["matrices"]][:2] == [DOWN0, Q0]
    assert found["matrices"][0]["shape"] == [24, 40]
    assert len(found["models"]) == 1


def test_inspect_a_pair_says_what_has_no_partner(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, drop(Q0))
    done = run("inspect", *pair)
    assert done.code == 0
    assert f"1 only in base: {Q0}" in done.out
    assert "PARTIAL: 1 in scope" in done.out
    assert run("inspect", *pair, "--json").report["missing"] == [Q0]
    assert run("inspect", *pair, "--layers", "1", "--json").report["missing"] == []


def test_inspect_decomposes_nothing(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def factorise(*_: object, **__: object) -> None:
        raise AssertionError("a factorisation was made")

    monkeypatch.setattr("geoscope.metrics.factorising.factorise", factorise)
    done = run("collapse", models["base"], models["tuned"], "--no-resume", "-j", "1", "--json")
    assert "a factorisation was made" in done.out
    assert run("inspect", models["base"], models["tuned"]).code == 0


@pytest.fixture
def saved(models: Models, tmp_path: Path) -> Path:
    path = tmp_path / "saved.json"
    assert run("compare", models["base"], models["tuned"], "-o", path, "--quiet").code == 0
    return path


def test_show_renders_what_compare_rendered(models: Models, saved: Path) -> None:
    assert run("show", saved).out == run("compare", models["base"], models["tuned"]).out
    assert json.loads(run("show", saved, "--json").out) == json.loads(saved.read_text())
    explained = run("compare", models["base"], models["tuned"], "--explain").out
    assert run("show", saved, "--explain").out == explained


def test_show_converts_and_judges_again(saved: Path, tmp_path: Path) -> None:
    files = [tmp_path / "again.json", tmp_path / "again.csv"]
    assert run("show", saved, "-o", files[0], "-o", files[1]).code == 0
    assert files[0].read_text() == saved.read_text()
    assert run("show", saved, "--fail-on", "OFF_PRINCIPAL").code == 3
    assert run("show", saved, "--fail-on", "nss>1").code == 0
    refuse(run("show", saved, "--fail-on", "WHAT"), 2, "codes")
    refuse(run("show", saved, "-o", saved), 2, "--force")


def test_show_needs_no_weights(models: Models, saved: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.json"
    moved.write_text(saved.read_text().replace(str(models["base"].parent), "/gone"))
    assert run("show", moved).code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "schema"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not text"),
        (b'{"schema": "geoscope.report/1"}', "not a complete"),
        (b'{"schema": "geoscope.report/3"}', "geoscope.report/2"),
    ],
)
def test_show_refuses_what_is_no_report(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    refuse(run("show", path), 1, words)


def test_show_of_a_missing_file(tmp_path: Path) -> None:
    refuse(run("show", tmp_path / "none.json"), 1, "cannot be read")


def test_metrics_lists_every_metric_and_shows_one_whole() -> None:
    from geoscope.metrics import METRICS

    listing = run("metrics")
    assert listing.code == 0
    for metric in METRICS:
        assert metric.id in listing.out
    for given in ("lift@k", "lift@64", "lift"):
        assert "C_LR(k)·mn/k²" in run("metrics", given).out
    whole = run("metrics", "update.stable_rank").out
    for word in ("formula", "range", "null", "reading", "do not conclude", "source"):
        assert word in whole
    refuse(run("metrics", "stabel_rank"), 2, "stabel_rank")


@pytest.mark.parametrize("metric", [(), ("update.k90",), ("update_sparsity",), ("lift@8",)])
def test_metrics_fit_eighty_columns(metric: tuple[str, ...]) -> None:
    text = run("metrics", *metric).out
    assert max(map(len, text.splitlines())) <= 80


def test_metrics_as_json_is_the_whole_table() -> None:
    from geoscope.metrics import METRICS

    document = run("metrics", "--json").report
    assert document["schema"] == "geoscope.metrics/1"
    rows = {row["id"].removeprefix("ROLE."): row for row in document["metrics"]}
    assert list(rows) == [metric.id for metric in METRICS]
    for metric in METRICS:
        row = rows[metric.id]
        for key in ("formula", "range", "reading", "caution", "floor", "aggregate", "source"):
            assert row[key] == getattr(metric, key), (metric.id, key)
        assert row["null"] == (metric.null.text if metric.null else None)
    (only,) = run("metrics", "lift@64", "--json").report["metrics"]
    assert only == rows["lift@k"]
    assert run("metrics", "mask_lift_low", "--json").report["metrics"][0]["option"] == "--masks"


def test_demo_unpacks_diagnoses_and_tells(tmp_path: Path) -> None:
    folder = tmp_path / "tour"
    done = run("demo", folder)
    assert done.code == 0, done.err
    assert "what is seen" in done.out
    told = " ".join(done.out.partition("a run that failed")[2].split())
    assert "accuracy 0.37 → 0.00" in told and "SPECTRUM_DISTORTED, 28 of 28 matrices" in told
    assert f"unpacked the demo run in {folder}" in done.err
    again = run("demo", folder)
    assert again.code == 0
    assert f"using the demo run in {folder}" in again.err
    assert again.out == done.out
    quiet = run("demo", folder, "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out.startswith("NO COLLAPSE: ")
    assert quiet.out.count("\n") == 1


def test_demo_speaks_the_numbers_of_its_table_in_eighty_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = run("demo").out
    assert max(map(len, text.splitlines())) <= 80
    (row,) = (line.split() for line in text.splitlines() if line.startswith("rank kept"))
    assert f"The effective rank ratio is {row[5]}: no spectrum collapsed." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    [
        "geoscope-demo",
        "a folder/with spaces " + "and more" * 8,
    ],
)
def test_what_the_demo_says_to_try_works(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("demo", folder).out.partition("try next\n")[2]
    commands = [shlex.split(line) for line in said.replace("\\\n", "").splitlines()]
    assert [words[:2] for words in commands] == [
        ["geoscope", name] for name in ("collapse", "compare", "anisotropy", "collapse", "metrics")
    ]
    for _, *words in commands:
        done = run(*words, *(["--dry-run"] if words[0] != "metrics" else []))
        assert done.code == 0, done.err


def test_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    refuse(run("demo", taken), 2, "another folder")
    refuse(run("demo", taken / "mine.txt"), 2, "another folder")
    assert "Traceback" in run("demo", taken, "--debug").err
    assert names_in(tmp_path) == ["taken"]
    assert names_in(taken) == ["mine.txt"]


# --- kept results -------------------------------------------------------------------------------


def test_a_rerun_recalls_and_no_resume_computes(models: Models) -> None:
    first = run("compare", models["base"], models["tuned"], "--json")
    assert "from the cache" not in first.err
    again = run("compare", models["base"], models["tuned"], "--json")
    assert "4 of 4 results from the cache" in again.err
    anew = run("compare", models["base"], models["tuned"], "--json", "--no-resume")
    assert "from the cache" not in anew.err
    expected = without_volatile(first.report)
    assert without_volatile(again.report) == without_volatile(anew.report) == expected


def test_cache_list_and_clear(models: Models, tmp_path: Path) -> None:
    assert "0 results" in run("cache", "list").out
    run("compare", models["base"], models["tuned"])
    assert "4 results" in run("cache", "list").out
    assert "removed 4 results" in run("cache", "clear").out
    assert "0 results" in run("cache", "list").out


def test_kept_results_of_other_parameters_are_not_used(models: Models) -> None:
    def recalled(*options: str) -> bool:
        done = run("compare", models["base"], models["tuned"], *options)
        return "from the cache" in done.err

    assert not recalled()
    assert recalled()
    for options in (["--k", "2"], ["--seed", "1"], ["--solver", "exact"], ["--masks"]):
        assert not recalled(*options)
    assert recalled()


def test_device_and_exact_solver_agree_with_the_default(models: Models) -> None:
    def values(*options: str) -> Sequence[dict[str, Any]]:
        done = run("compare", models["base"], models["tuned"], "--json", *options)
        return [one["values"] for one in done.report["layers"]]

    for exact, quick in zip(values("--solver", "exact"), values("--device", "cpu"), strict=True):
        assert exact.keys() == quick.keys()
        for key, value in exact.items():
            assert quick[key] is value or quick[key] == pytest.approx(value, rel=1e-7, abs=1e-8), (
                key
            )


def test_compute_dtype_is_recorded(models: Models) -> None:
    done = run("collapse", models["base"], models["tuned"], "--json", "--dtype", "float32")
    assert done.report["provenance"]["compute_dtype"] == "float32"
    exact = run("collapse", models["base"], models["tuned"], "--json")
    for key in ("nss", "rank_ratio", "update.stable_rank"):
        a, b = (one.report["summary"]["model"][key] for one in (done, exact))
        assert a == pytest.approx(b, rel=1e-3)


def test_results_do_not_depend_on_jobs_memory_or_shards(models: Models, tmp_path: Path) -> None:
    sharded = save_model(tmp_path / "sharded", weights(100), shards=3)

    def report(tuned: Path, *options: str) -> dict[str, Any]:
        done = run("compare", models["base"], tuned, "--json", "--no-resume", *options)
        return {key: done.report[key] for key in ("layers", "summary", "vectors")}

    expected = report(models["tuned"])
    assert report(models["tuned"], "-j", "1") == expected
    assert report(models["tuned"], "-j", "3", "--max-memory", "1") == expected
    assert report(sharded) == expected


def test_bf16_pairs_say_so(tmp_path: Path) -> None:
    def narrow(found: Weights) -> Weights:
        return {name: weight.to(torch.bfloat16) for name, weight in found.items()}

    base = save_model(tmp_path / "base", narrow(weights()))
    tuned = save_model(tmp_path / "tuned", narrow(weights(100, rho=0.001)))
    done = run("collapse", base, tuned, "--json")
    assert done.code == 0
    assert {one["storage_dtype"] for one in done.report["provenance"]["refs"]} == {"bfloat16"}
    assert done.report["summary"]["verdict"]["code"] == "UNDETERMINED"
