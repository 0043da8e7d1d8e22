"""`geoscope capacity` on adapters that PEFT wrote: alone, over their base, and merged."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from geoscope.report import read
from tests.helpers import tiny_models
from tests.helpers.matrices import orthonormal
from tests.helpers.running import run

with warnings.catch_warnings():  # of packages that it imports
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

RANK = 16
TARGETS = ["q_proj", "down_proj"]
# σ_{i+1}/σ_i of the update, and what is said of it at this rank.
SPECTRA = {"flat": (1.0, "SATURATED"), "falling": (0.8, "USED"), "idle": (0.5, "IDLE"),
           "collapsed": (0.05, "RANK_COLLAPSE")}  # fmt: skip


@dataclass(frozen=True)
class Adapters:
    """Folders: the base, an adapter for each of SPECTRA, and the collapsed one merged."""

    base: Path
    merged: Path
    of: dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    root = tmp_path_factory.mktemp("capacity")
    found = Adapters(root / "base", root / "merged", {name: root / name for name in SPECTRA})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_models.llama(found.base, hidden_size=32, intermediate_size=40)
        for name, folder in found.of.items():
            model = tiny_models.live(found.base, torch.float32)
            config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
            adapted = peft.get_peft_model(model, config)
            fill(adapted, SPECTRA[name][0])
            adapted.save_pretrained(folder)
            if name == "collapsed":
                adapted.double().merge_and_unload().save_pretrained(found.merged)
    return found


def fill(adapted: Any, rate: float) -> None:
    """Factors with orthonormal directions, and singular values that fall at this rate."""
    for i, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_A" in name:
            parameter.data = orthonormal(parameter.shape[1], RANK, seed=i).T.float().contiguous()
        elif "lora_B" in name:
            values = 0.01 * rate ** torch.arange(RANK)
            parameter.data = (orthonormal(len(parameter), RANK, seed=i) * values).float()


@pytest.mark.parametrize("name", SPECTRA)
def test_an_adapter_alone(made: Adapters, name: str) -> None:
    done = run("capacity", made.of[name], "--json")
    assert done.code == 0
    report = done.report
    rate, code = SPECTRA[name]
    assert report["kind"] == "capacity"
    assert (report["summary"]["verdict"]["code"], report["summary"]["verdict"]["share"]) == (
        code,
        1,
    )
    assert len(report["layers"]) == 4
    sigma = rate ** torch.arange(RANK, dtype=torch.float64)
    share = sigma / sigma.sum()
    expected = float(torch.exp(torch.special.entr(share).sum())) / RANK
    for layer in report["layers"]:
        assert layer["values"]["nominal_rank"] == RANK
        assert layer["values"]["effective_rank_share"] == pytest.approx(expected, rel=1e-3)
        assert layer["values"]["relative_update"] is None


def test_the_words_of_an_adapter_alone(made: Adapters) -> None:
    done = run("capacity", made.of["collapsed"], "--details")
    assert "RANK_COLLAPSE · 100 % of the changed matrices" in done.out
    assert "matrices: RANK_COLLAPSE 4 (100 %)" in done.out
    assert "a few directions hold the update, far fewer than the rank" in " ".join(done.out.split())
    words = " ".join(done.out.split())
    assert "Rank: 1 holds 90 % of the energy above the noise in every matrix." in words
    assert "An update in its factors has no stored entries." in words
    assert "relative_update). The base was not read." in words
    assert "The base is zero" not in words
    assert "energy's" not in words and "share of energy" not in words
    assert done.err.startswith(f"measuring 4 matrices of {made.of['collapsed']} without its base")


def test_over_its_base_the_numbers_are_the_same_and_the_size_is_known(made: Adapters) -> None:
    alone = run("capacity", made.of["falling"], "--json").report
    over = run("capacity", made.base, made.of["falling"], "--json")
    assert over.code == 0
    assert over.err.startswith("comparing 4 matrices of")
    for mine, theirs in zip(over.report["layers"], alone["layers"], strict=True):
        assert mine["name"] == theirs["name"]
        assert mine["verdict"] == theirs["verdict"]
        assert mine["values"].pop("relative_update") > 0
        del theirs["values"]["relative_update"]
        for key in ("base_cosine", "base_share"):  # of the base, which the adapter alone has not
            assert mine["values"].pop(key) is not None and theirs["values"].pop(key) is None
        for key, value in theirs["values"].items():
            near = None if value is None else pytest.approx(value, rel=1e-9)
            assert mine["values"][key] == near, key
    assert "The base" not in run("capacity", made.base, made.of["falling"], "--details").out


def test_a_merged_model_is_a_full_update_with_a_suggested_rank(made: Adapters) -> None:
    done = run("capacity", made.base, made.merged, "--json")
    assert done.code == 0
    verdict = done.report["summary"]["verdict"]
    assert (verdict["code"], verdict["share"]) == ("FULL_UPDATE", 1)
    assert verdict["counts"] == {"NO_UPDATE": 10, "FULL_UPDATE": 4}
    model = done.report["summary"]["model"]
    assert model["suggested_rank"] == 1
    assert model["nominal_rank"] is None
    text = run("capacity", made.base, made.merged, "--details").out
    assert "nominal rank" not in text and "k90/r_max" not in text
    assert "suggested rank" in text


def test_the_same_model_twice_is_no_update(made: Adapters) -> None:
    done = run("capacity", made.base, made.base)
    assert done.code == 0
    assert "NO_UPDATE" in done.out
    assert "no weight in scope changed." in done.out
    assert "Rank:" not in done.out


def test_one_full_model_alone_is_refused(made: Adapters) -> None:
    done = run("capacity", made.base)
    assert done.code != 0
    assert done.err.startswith("geoscope: ") and done.err.count("\n") == 1


def test_a_broken_adapter_is_undetermined_and_no_crash(made: Adapters, tmp_path: Path) -> None:
    """Every factor holds a NaN: no matrix has a number."""
    from safetensors.torch import load_file, save_file

    for one in made.of["flat"].iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor[0, 0] = float("nan")
    save_file(tensors, file)
    for arguments in ((tmp_path,), (made.base, tmp_path)):
        done = run("capacity", *arguments)
        assert done.code == 1
        assert "no matrix could be compared" in done.err
        assert "UNDETERMINED" in done.out
        assert "Traceback" not in done.err


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("SATURATED", 3), ("IDLE", 0), ("FULL_UPDATE,SATURATED", 3),
        ("effective_rank_share>0.9", 3), ("effective_rank_share<0.9", 0), ("suggested_rank>20", 0),
    ],
)  # fmt: skip
def test_fail_on(made: Adapters, expression: str, code: int) -> None:
    done = run("capacity", made.of["flat"], "--fail-on", expression)
    assert done.code == code
    assert ("--fail-on:" in done.err) == (code == 3)


@pytest.mark.parametrize("expression", ["ON_PRINCIPAL", "OFF_PRINCIPAL", "nss>1", "USED_UP"])
def test_conditions_of_other_kinds_are_refused(made: Adapters, expression: str) -> None:
    done = run("capacity", made.of["flat"], "--fail-on", expression)
    assert done.code == 2
    assert done.err.count("\n") == 1


def test_codes_of_capacity_are_none_of_the_others(made: Adapters) -> None:
    assert run("collapse", made.base, made.of["flat"], "--fail-on", "SATURATED").code == 2


def test_limits_move_the_verdict(made: Adapters) -> None:
    done = run("capacity", made.of["flat"], "--limit", "capacity.saturated_k90=0.99", "--explain")
    assert done.code == 0
    assert "USED" in done.out
    assert "capacity.saturated_k90" in done.out
    assert "distorted.nss" not in done.out, "limits of another verdict"
    assert run("capacity", made.of["flat"], "--limit", "capacity.nothing=1").code == 2


def test_dry_run_reads_headers_alone(made: Adapters, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    for arguments in ((made.of["flat"],), (made.base, made.of["flat"])):
        done = run("capacity", *arguments, "--dry-run", "-o", out)
        assert done.code == 0
        assert "4 matrices in scope" in done.out
        assert "SATURATED" not in done.out
        document = run("capacity", *arguments, "--dry-run", "--json").report
        assert len(document["matrices"]) == 4
    assert not out.exists()


def test_every_file_is_written(made: Adapters, tmp_path: Path) -> None:
    suffixes = (".json", ".csv", ".md", ".png")
    outs = [argument for suffix in suffixes for argument in ("-o", tmp_path / f"report{suffix}")]
    assert run("capacity", made.of["falling"], *outs).code == 0
    assert {path.suffix for path in tmp_path.iterdir()} >= {*suffixes}
    assert all(path.stat().st_size > 200 for path in tmp_path.iterdir())
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_report_is_shown_again(made: Adapters, tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    first = run("capacity", made.of["idle"], "-o", saved)
    again = run("show", saved)
    assert (again.code, again.out) == (0, first.out)
    assert read(saved).to_json() == json.loads(saved.read_text())
    assert run("show", saved, "--fail-on", "IDLE").code == 3
    assert run("show", saved, "--fail-on", "SATURATED").code == 0
    assert run("show", saved, "-o", tmp_path / "figure.png").code == 0


def test_a_rerun_recalls_and_judges_by_the_limits_of_now(made: Adapters) -> None:
    first = run("capacity", made.of["falling"], "--json")
    again = run("capacity", made.of["falling"], "--json")
    assert "4 of 4 results from the cache" in again.err
    assert again.report["layers"] == first.report["layers"]
    judged = run("capacity", made.of["falling"], "--limit", "capacity.idle_k99=1", "--json")
    assert judged.report["summary"]["verdict"]["code"] == "IDLE"


def test_help_says_both_uses() -> None:
    text = run("capacity", "--help").out
    assert "ADAPTER|BASE" in text
    for option in ("--fail-on", "--explain", "--limit", "--initial-adapter", "--dry-run"):
        assert option in text
    for option in ("--quick", "--masks", "--curves", "--k "):
        assert option not in text, "an option that would do nothing"
