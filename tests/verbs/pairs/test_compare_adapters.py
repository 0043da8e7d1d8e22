"""An adapter as a tuned model: its report against that of PEFT's own merge, saved in fp64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import geoscope
from geoscope.records import LayerRecord, Status
from tests.helpers import tiny_models
from tests.helpers.merged import CASES, Made, by_name, lora, made, moved
from tests.helpers.running import run

OPTIONS = geoscope.Options(ks=(2, 4))
# What only stored entries tell, what counts their rounding, and ranks: those of a merged update are
# of its rounding, too.
ENTRIES = ("update_sparsity", "update_sparsity_abs", "update_sparsity_exact", "precision_ratio")
RANKS = ("numerical_rank", "signal_rank")


_EACH_TIME = ("lora", "dora, fused", "experts", "rslora, patterns")


@pytest.fixture(
    scope="module",
    params=[
        name if name in _EACH_TIME else pytest.param(name, marks=pytest.mark.slow) for name in CASES
    ],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("adapter"), *CASES[request.param])


def assert_same_numbers(found: LayerRecord, expected: LayerRecord) -> None:
    for key, value in expected.values.items():
        mine = found.values[key]
        if key in ENTRIES or value is None or key.endswith(RANKS):
            continue
        if mine is None:
            assert key.endswith("condition_number") or found.raw.get(key) is not None, key
            continue
        near = pytest.approx(value, rel=1e-6, abs=1e-6)
        assert mine == near, (found.name, key)


def test_the_report_is_that_of_the_merged_model(case: Made) -> None:
    found = geoscope.compare(case.base, case.adapter, options=OPTIONS)
    expected = by_name(geoscope.compare(case.base, case.merged, options=OPTIONS))
    assert found.coverage.status == "COMPLETE"
    changed = {name for name, one in expected.items() if one.values["update.frobenius_norm"]}
    assert set(by_name(found)) == changed
    for name, one in by_name(found).items():
        assert_same_numbers(one, expected[name])


def test_base_and_adapter_is_the_merged_model(case: Made) -> None:
    """Over another base than that of the comparison the weights are made, one at a time."""
    reference = f"{case.base}+{case.adapter}"
    own = geoscope.compare(case.base, reference, kind="collapse", options=OPTIONS)
    alone = geoscope.compare(case.base, case.adapter, kind="collapse", options=OPTIONS)
    assert own.layers == alone.layers
    found = by_name(geoscope.compare(case.merged, reference, kind="anisotropy", options=OPTIONS))
    for one in found.values():
        assert (one.values["relative_update"] or 0) < 1e-7


def test_a_wrong_alpha_is_another_update(tmp_path: Path) -> None:
    """Negative control."""
    case = made(tmp_path, *CASES["lora"])
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    (case.adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    refused = run("anisotropy", case.base, case.adapter)
    assert refused.code == 1 and "lora_alpha" in refused.err
    right, wrong = (
        run("anisotropy", case.base, case.adapter, "--lora-alpha", str(alpha), "--json").report
        for alpha in (5, 10)
    )
    one, two = (each["summary"]["model"]["relative_update"] for each in (right, wrong))
    assert two == pytest.approx(2 * one, rel=1e-9)


def test_an_update_of_factors_has_no_single_entries(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    report = geoscope.compare(case.base, case.adapter, options=OPTIONS)
    for layer in report.layers:
        assert layer.status["update_sparsity"] is Status.NOT_APPLICABLE
        assert 0 < (layer.values["precision_ratio"] or 0) < 1e-6, "rounding of fp32 factors"
    left = [one for one in report.coverage.skipped if "leaves it as it is" in one.reason]
    assert left and not any(one.missing for one in left)


def test_overlaps_of_adapters_and_of_a_model(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    report = geoscope.compare(
        case.base, case.adapter, case.merged, case.adapter, kind="alignment", options=OPTIONS
    )
    for one in report.overlaps:
        assert one.values["update_cosine"] == pytest.approx(1, abs=1e-9)
        assert one.values["phi_left@1,1"] == pytest.approx(1, abs=1e-9)


def test_an_adapter_beside_itself_has_not_moved(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    named = json.dumps({**config, "base_model_name_or_path": str(case.base)})
    (case.adapter / "adapter_config.json").write_text(named)
    done = run("anisotropy", case.adapter, case.adapter, "--json")
    assert "their difference" in done.err
    assert done.report["summary"]["model"]["update.frobenius_norm"] == 0
    one = f"{case.base}+{case.adapter}"
    done = run("anisotropy", one, one, "--json")
    assert done.report["summary"]["model"]["update.frobenius_norm"] == 0


def test_over_another_adapter_it_is_said(tmp_path: Path) -> None:
    """An adapter of another base than that of the BASE's own lies over both."""
    case = made(tmp_path, *CASES["lora"])
    other = tmp_path / "other"
    shutil.copytree(case.adapter, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/merged"})
    )
    done = run("anisotropy", f"{case.base}+{case.adapter}", other, "--json")
    assert "give MODEL+ADAPTER twice" in done.err
    assert done.report["summary"]["model"]["update.frobenius_norm"] > 0


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    other = tiny_models.llama(tmp_path / "other", num_hidden_layers=1)
    done = run("collapse", other, case.adapter)
    assert done.code == 1
    assert "the base lacks 3 of 6 adapted modules" in done.err
    wider = tiny_models.llama(tmp_path / "wider", hidden_size=32)
    assert "give the model that it was trained on" in run("collapse", wider, case.adapter).err


# --- adapters that do not start at zero ---------------------------------------------------------


@pytest.fixture(scope="module", params=["pissa", "olora"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(
        tmp_path_factory.mktemp("start"),
        tiny_models.llama,
        lora(init_lora_weights=request.param),
        train=moved,
        dtype=torch.float32,
    )


def test_the_start_is_taken_off(started: Made) -> None:
    options = geoscope.Options(ks=(2, 4), initial_adapter=str(started.start))
    found = by_name(geoscope.compare(started.base, started.adapter, options=options))
    expected = by_name(geoscope.compare(started.base, started.merged, options=OPTIONS))
    for name, one in found.items():
        for key in ("relative_update", "update.stable_rank", "nss", "energy_two_sided@2"):
            assert one.values[key] == pytest.approx(expected[name].values[key], rel=1e-4), key


def test_without_its_start_it_is_refused(started: Made) -> None:
    done = run("collapse", started.base, started.adapter)
    assert done.code == 2
    assert "--initial-adapter" in done.err


def test_a_rewritten_base_with_its_adapter_is_the_original_model(tmp_path: Path) -> None:
    base, out = tiny_models.llama(tmp_path / "base"), tmp_path / "out"
    assert run("init-adapter", base, "--rank", "3", "-o", out).code == 0
    for tuned in (f"{out / 'residual'}+{out / 'adapter'}", str(out / "residual")):
        report = geoscope.compare(base, tuned, kind="anisotropy", options=OPTIONS)
        rho = report.summary.model["relative_update"]
        assert isinstance(rho, float)
        assert (rho < 1e-6) == ("+" in tuned), "the residual alone is another model"
    report = geoscope.compare(str(out / "adapter"), base, kind="anisotropy", options=OPTIONS)
    rho = report.summary.model["relative_update"]
    assert isinstance(rho, float) and rho < 1e-6


def test_a_start_that_nothing_tells_of_is_seen(started: Made, tmp_path: Path) -> None:
    """The config says nothing, as after a conversion: the blind test."""
    folder = tmp_path / "silent"
    folder.mkdir()
    for one in started.adapter.iterdir():
        (folder / one.name).write_bytes(one.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    done = run("collapse", started.base, folder, "--k", "2,4")
    assert done.code == 0
    assert "INIT_MISMATCH" in done.out
    assert "--initial-adapter" in done.err


def test_an_ordinary_adapter_is_not_taken_for_one(tmp_path: Path) -> None:
    """Negative control of the blind test."""
    case = made(tmp_path, *CASES["lora"])
    done = run("collapse", case.base, case.adapter, "--k", "2,4")
    assert "INIT_MISMATCH" not in done.out


# --- without the base ---------------------------------------------------------------------------


def test_an_adapter_alone_has_the_spectrum_of_its_update(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["rslora, patterns"])
    whole = by_name(geoscope.compare(case.base, case.adapter, kind="anisotropy", options=OPTIONS))
    done = run("anisotropy", case.adapter, "--no-base", "--json")
    alone = {one["name"]: one for one in done.report["layers"]}
    assert set(alone) == set(whole)
    for name, one in whole.items():
        for key in ("update.stable_rank", "update.effective_rank", "update.frobenius_norm"):
            assert alone[name]["values"][key] == pytest.approx(one.values[key], rel=1e-12)
        assert alone[name]["values"]["relative_update"] is None


def test_what_needs_the_base_is_named(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["ia3"])
    for one in ("anisotropy", "--no-base"), ("capacity",):
        done = run(one[0], case.adapter, *one[1:])
        assert done.code == 1
        assert "the update of IA3 cannot be computed without the base; give BASE" in done.err


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    for reference in (case.base, f"{case.base}+{case.adapter}"):
        done = run("capacity", reference)
        assert done.code == 2
        assert "give" in done.err and "adapter" in done.err and "Hub" not in done.err
    done = run("capacity", case.adapter, "--dry-run", "--json")
    (model,) = done.report["models"]
    assert model["given"] == str(case.adapter)


def test_two_adapters_of_one_base_are_their_difference(tmp_path: Path) -> None:
    """As BASE and TUNED: neither lies over the other."""
    first = made(tmp_path / "one", *CASES["lora"])
    second = tmp_path / "two"
    second.mkdir()
    tensors = load_file(first.adapter / "adapter_model.safetensors")
    moved = {name: one * 1.5 if "lora_B" in name else one for name, one in tensors.items()}
    save_file(moved, second / "adapter_model.safetensors", metadata={"format": "pt"})
    (second / "adapter_config.json").write_bytes(
        (first.adapter / "adapter_config.json").read_bytes()
    )
    before, after = f"{first.base}+{first.adapter}", second
    found = by_name(geoscope.compare(before, after, kind="anisotropy", options=OPTIONS))
    whole = by_name(geoscope.compare(first.base, first.adapter, kind="anisotropy", options=OPTIONS))
    for name, one in found.items():
        size = one.values["update.frobenius_norm"]
        assert size == pytest.approx(0.5 * (whole[name].values["update.frobenius_norm"] or 0))
    same = geoscope.compare(before, str(first.adapter), kind="anisotropy", options=OPTIONS)
    assert {one.status["update.stable_rank"] for one in same.layers} == {Status.ZERO_UPDATE}
