"""What is raised while one matrix is computed is told of it alone, in every command.

A kernel is made to raise for the one matrix that is tall; all that is said of the others has to be
what the undisturbed command says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.linalg import Operand
from geoscope.linalg.product import _Thin
from geoscope.metrics.overlaps import UpdateOf
from geoscope.trajectory.factor_series import FactorSeries
from tests.helpers.matrices import gaussian, save_model
from tests.helpers.running import Done, run

NAMES = [
    f"model.layers.{i}.{module}.weight"
    for i in range(2)
    for module in ("self_attn.q_proj", "mlp.up_proj")
]
TALL = "model.layers.1.mlp.up_proj.weight"
PATH = TALL.removesuffix(".weight")
TOLD = "linalg.eigh: failed to converge (error code: 2)"
LINALG = vars(torch.linalg)["LinAlgError"](f"{TOLD}.\nC++ frames")
ERRORS = {
    TOLD: LINALG,
    "kernel launch failed": RuntimeError("kernel launch failed"),
    "memory ran out": MemoryError(),
    "IndexError: out of range": IndexError("out of range"),
}


def side(name: str) -> int:
    return 40 if name == TALL else 24


def weights(seed: int, step: float = 0.0) -> dict[str, Tensor]:
    """The base, and `step` times an update of its own direction."""
    return {
        name: (
            gaussian(side(name), 24, seed=i)
            + step * gaussian(side(name), 24, seed=seed + i, sd=0.001)
        ).float()
        for i, name in enumerate(NAMES)
    }


def adapter(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA of rank 2 on all matrices."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for i, name in enumerate(NAMES):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        tensors[f"{key}A.weight"] = gaussian(2, 24, seed=seed + i).float()
        tensors[f"{key}B.weight"] = gaussian(side(name), 2, seed=seed + 50 + i).float()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base),
        "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("one")
    base = save_model(root / "base", weights(0))
    found = {"base": base, "run": root / "run", "loras": root / "loras"}
    found |= {
        name: save_model(root / name, weights(seed, 1.0))
        for name, seed in (("tuned", 100), ("other", 200))
    }
    for t in range(1, 6):
        save_model(root / "run" / f"checkpoint-{t}", weights(100, t))
        adapter(root / "loras" / f"checkpoint-{t}", base, 100 * t)
    return found | {"lora": root / "loras" / "checkpoint-1"}


Break = Callable[[BaseException], None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Makes what factorises the tall matrix, or its factors, raise an error."""

    def break_it(error: BaseException) -> None:
        def raising(owner: Any, name: str, is_tall: Callable[..., bool]) -> None:
            inner = getattr(owner, name)

            def kernel(*given: Any, **options: Any) -> Any:
                if is_tall(*given):
                    raise error
                return inner(*given, **options)

            monkeypatch.setattr(owner, name, kernel)

        raising(Operand, "gram", lambda A: A.shape == (40, 24))
        raising(_Thin, "of", lambda B, *_: len(B) == 40)
        raising(FactorSeries, "of", lambda factors, *_: len(factors[0][0]) == 40)

    return break_it


def others(report: dict[str, Any], key: str = "layers") -> list[dict[str, Any]]:
    return [row for row in report.get(key, []) if row["name"] not in (TALL, PATH)]


COMMANDS = {
    "collapse": ("collapse", "{base}", "{tuned}"),
    "anisotropy": ("anisotropy", "{base}", "{tuned}"),
    "alignment": ("alignment", "{base}", "{tuned}"),
    "quick": ("compare", "--quick", "{base}", "{tuned}"),
    "several": ("compare", "{base}", "{tuned}", "{other}"),
    "anchor": ("compare", "{base}", "{tuned}", "--anchor", "{other}"),
    "over its base": ("compare", "{base}", "{lora}"),
    "alone": ("anisotropy", "--no-base", "{lora}"),
    "capacity": ("capacity", "{lora}"),
    "capacity of a model": ("capacity", "{base}", "{tuned}"),
    "trajectory": ("trajectory", "{run}", "--base", "{base}"),
    "trajectory of adapters": ("trajectory", "{loras}"),
}


def command(name: str, made: dict[str, Path], *more: str) -> Done:
    words = [word.format(**made) for word in COMMANDS[name]]
    keep = [] if words[0] == "trajectory" else ["--no-resume"]
    return run(*words, "--json", *keep, *more)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_others_are_as_without_it(name: str, made: dict[str, Path], broken: Break) -> None:
    # what is pooled over a series (dampings, the best method) is of those that are followed
    series = name.startswith("trajectory")
    sound = command(name, made, *(("--exclude", TALL) if series else ()))
    assert sound.code == 0, sound.err
    broken(LINALG)
    found = command(name, made)
    assert found.code == 0, found.err
    assert others(found.report) == others(sound.report)
    assert others(found.report, "overlaps") == others(sound.report, "overlaps")
    rows = [row for row in found.report["layers"] if row["name"] in (TALL, PATH)]
    assert rows
    for row in rows:
        assert set(row["status"].values()) == {"NOT_CONVERGED"}
        assert not any(value is not None for value in row["values"].values())
        assert row["notes"] == [TOLD]
    coverage = found.report["coverage"]
    assert coverage["status"] == "PARTIAL"
    assert set(coverage["missing"]) == {rows[0]["name"]}
    reasons = [one["reason"] for one in coverage["skipped"] if one["name"] == rows[0]["name"]]
    assert f"NOT_CONVERGED: {TOLD}" in reasons
    strict = command(name, made, "--strict")
    assert strict.code == 1
    assert rows[0]["name"] in strict.err


@pytest.mark.parametrize("reason", ERRORS)
@pytest.mark.parametrize("name", ["collapse", "trajectory"])
def test_any_error_is_told_in_one_line(
    name: str, reason: str, made: dict[str, Path], broken: Break
) -> None:
    broken(ERRORS[reason])
    (row,) = [one for one in command(name, made).report["layers"] if one["name"] == TALL]
    assert row["notes"] == [reason]


def test_the_text_says_which_and_why(made: dict[str, Path], broken: Break) -> None:
    broken(MemoryError())
    for name in ("collapse", "trajectory"):
        text = run(*(word.format(**made) for word in COMMANDS[name]), "--details").out
        assert f"PARTIAL 1 of 4 matrices not compared: {TALL}" in text
        assert "memory ran out (1 matrix)" in text


def test_a_failed_overlap_makes_the_coverage_partial(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from geoscope.verbs.pairs import several

    inner = several.overlap

    def failing(a: UpdateOf, b: UpdateOf, **options: Any) -> Any:
        if a.base.weight.shape[1] == 40:
            raise LINALG
        return inner(a, b, **options)

    monkeypatch.setattr(several, "overlap", failing)
    report = command("several", made).report
    assert TALL not in [one["name"] for one in report["overlaps"]]
    assert {one["name"] for one in report["overlaps"]} == {*NAMES} - {TALL}
    assert report["coverage"]["missing"] == [TALL]
    (reason,) = [one["reason"] for one in report["coverage"]["skipped"] if one["name"] == TALL]
    assert reason.startswith("NOT_CONVERGED: overlap of 1 and 2: linalg.eigh")


def extrapolated(made: dict[str, Path], out: Path, series: str, method: str) -> Done:
    words = ("--to-step", "6", "--method", method, "--force", "-o", out, "--json", "--no-resume")
    return run("extrapolate", made[series], "--base", made["base"], *words)


def test_a_model_holds_what_could_not_be_followed(
    made: dict[str, Path], broken: Break, tmp_path: Path
) -> None:
    sound = extrapolated(made, tmp_path / "sound", "run", "linear")
    broken(LINALG)
    found = extrapolated(made, tmp_path / "found", "run", "linear")
    assert (sound.code, found.code) == (0, 0), found.err
    one, two = (load_file(tmp_path / at / "model.safetensors") for at in ("sound", "found"))
    last = load_file(made["run"] / "checkpoint-5" / "model.safetensors")
    assert torch.equal(two[TALL], last[TALL])
    assert not torch.equal(one[TALL], last[TALL])
    assert all(torch.equal(one[name], two[name]) for name in NAMES if name != TALL)
    assert any(note.startswith(f"{TALL}: NOT_CONVERGED") for note in found.report["notes"])


@pytest.mark.parametrize("overflows", [True, False])
def test_a_prediction_that_fails_is_held_and_told(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool
) -> None:
    from geoscope.verbs.series import extrapolate

    inner = extrapolate._combination

    def failing(tensor: Any, weights: Tensor, start: int, stop: int) -> Tensor:
        if tensor.name != TALL:
            return inner(tensor, weights, start, stop)
        if not overflows:
            raise MemoryError
        return inner(tensor, weights, start, stop) * float("inf")

    monkeypatch.setattr(extrapolate, "_combination", failing)
    found = extrapolated(made, tmp_path / "out", "run", "linear")
    assert found.code == 0, found.err
    last = load_file(made["run"] / "checkpoint-5" / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[TALL], last[TALL])
    why = "the prediction overflows torch.float32" if overflows else "memory ran out"
    assert f"{TALL}: NOT_CONVERGED: {why}; copied" in found.report["notes"]
    assert found.report["tensors"][TALL] == "hold"
    record = json.loads((tmp_path / "out" / "geoscope.json").read_text())
    assert record["tensors"] == found.report["tensors"]


def test_a_predicted_adapter_holds_a_module_that_fails(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geoscope.trajectory.prediction import Prediction

    inner = Prediction.of

    def failing(prediction: Prediction, updates: Any) -> Any:
        if updates[0].shape[0] == 40:
            raise LINALG
        return inner(prediction, updates)

    monkeypatch.setattr(Prediction, "of", failing)
    found = extrapolated(made, tmp_path / "out", "loras", "linear")
    assert found.code == 0, found.err
    assert found.report["tensors"][PATH] == "hold"
    assert any(note.startswith(f"{PATH}: NOT_CONVERGED") for note in found.report["notes"])
    key = f"base_model.model.{PATH}.lora_"
    products = []
    for folder, scaling in ((tmp_path / "out", 1), (made["loras"] / "checkpoint-5", 1)):
        held = load_file(folder / "adapter_model.safetensors")
        products.append(scaling * held[f"{key}B.weight"] @ held[f"{key}A.weight"])
    ratio = products[0].norm() / products[1].norm()  # lora_alpha stays, the rank is another
    torch.testing.assert_close(products[0], ratio * products[1], rtol=1e-4, atol=1e-7)


def test_a_start_is_refused_whole_with_the_matrix_and_a_way_out(
    made: dict[str, Path], broken: Break, tmp_path: Path
) -> None:
    broken(LINALG)
    words = ("init-adapter", made["base"], "--method", "pissa", "-r", "2")
    refused = run(*words, "-o", tmp_path / "refused")
    assert refused.code == 1
    (line,) = [one for one in refused.err.splitlines() if one.startswith("geoscope: ")]
    assert line.startswith(f"geoscope: {TALL}: ")
    assert f"--exclude '{TALL}'" in line
    assert not (tmp_path / "refused" / "adapter").exists()
    assert run(*words, "--exclude", TALL, "-o", tmp_path / "rest").code == 0


def test_a_check_that_cannot_be_made_fails_by_name(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geoscope.verbs.adapters import verify as verify_adapter

    out = tmp_path / "out"
    assert run("init-adapter", made["base"], "--method", "pissa", "-r", "2", "-o", out).code == 0
    inner = verify_adapter.effective_error

    def failing(W: Tensor, *rest: Any) -> float:
        if len(W) == 40:
            raise MemoryError
        return inner(W, *rest)

    monkeypatch.setattr(verify_adapter, "effective_error", failing)
    found = run("verify-adapter", out, "--json")
    assert found.code == 1
    checks = {one["id"]: one for one in found.report["checks"]}
    assert not checks["weights"]["ok"]
    assert checks["weights"]["name"] == TALL
    assert "memory ran out" in checks["weights"]["text"]
    assert all(one["ok"] for name, one in checks.items() if name != "weights")


def test_a_conversion_is_refused_whole_with_the_module(
    made: dict[str, Path], broken: Break, tmp_path: Path
) -> None:
    broken(LINALG)
    initial, trained = (made["loras"] / f"checkpoint-{t}" for t in (1, 2))
    words = ("convert-adapter", initial, trained, "--rank", "2", "--base", made["base"], "--force")
    refused = run(*words, "-o", tmp_path / "out")
    assert refused.code == 1
    assert f"geoscope: {PATH}: linalg.eigh" in refused.err
    assert not (tmp_path / "out" / "adapter_config.json").exists()


# --- real inputs ----------------------------------------------------------------------------------

FROZEN, MOVED = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 × 512, where leading pairs have a route of their own; steps 10 and 20 are equal."""
    root = tmp_path_factory.mktemp("frozen")
    base = {name: gaussian(512, 512, seed=i).float() for i, name in enumerate((FROZEN, MOVED))}
    update = gaussian(512, 512, seed=9, sd=2e-4).float()
    for step, times in ((0, 0), (10, 1), (20, 1), (30, 2)):
        save_model(root / f"checkpoint-{step}", base | {MOVED: base[MOVED] + times * update})
    return root


@pytest.mark.parametrize("words", [("collapse",), ("compare", "--quick")])
def test_a_frozen_matrix_is_a_zero_update(frozen: Path, words: tuple[str, ...]) -> None:
    sides = (frozen / "checkpoint-0", frozen / "checkpoint-30")
    found = run(*words, *sides, "--json", "--strict", "--no-resume")
    assert found.code == 0, found.err
    assert found.layer(FROZEN)["verdict"]["code"] == "NO_UPDATE"
    assert found.layer(FROZEN)["values"]["relative_update"] == 0
    assert found.layer(MOVED)["values"]["relative_update"] > 0


def test_equal_checkpoints_and_frozen_matrices_are_followed(frozen: Path, tmp_path: Path) -> None:
    found = run("trajectory", frozen, "--json", "--strict")
    assert found.code == 0, found.err
    assert found.report["coverage"]["status"] == "COMPLETE"
    assert found.layer(FROZEN)["status"]["rank1_share_last"] == "ZERO_UPDATE"
    words = ("--to-step", "40", "--method", "linear", "--force", "-o", tmp_path / "out")
    assert run("extrapolate", frozen, *words).code == 0
    held = load_file(frozen / "checkpoint-30" / "model.safetensors")[FROZEN]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[FROZEN], held)


@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1e30, 1e60])
def test_numbers_without_a_unit_do_not_depend_on_the_scale(tmp_path: Path, scale: float) -> None:
    name = NAMES[0]
    pair = [one[name].double() for one in (weights(0), weights(100, 1.0))]
    numbers = []
    for size in (1.0, scale):
        sides = [
            save_model(tmp_path / f"{size:g}-{i}", {name: one * size}) for i, one in enumerate(pair)
        ]
        found = run("collapse", *sides, "--json", "--no-resume")
        assert found.code == 0, found.err
        numbers.append(found.layer(name)["values"])
    for key in ("relative_update", "nss", "update.stable_rank"):
        assert numbers[1][key] == pytest.approx(numbers[0][key], rel=1e-9)


@pytest.mark.parametrize("scale", [1e-280, 1e-180, 1e200, 1e300])
def test_weights_whose_squares_leave_fp64_say_so(tmp_path: Path, scale: float) -> None:
    sides = []
    for name, model in (("base", weights(0)), ("tuned", weights(100, 1.0))):
        model[TALL] = model[TALL].double() * scale
        sides.append(save_model(tmp_path / name, model))
    for words in (("collapse",), ("compare", "--quick")):
        found = run(*words, *sides, "--json", "--no-resume")
        assert found.code == 0, found.err
        assert found.report["coverage"]["missing"] == [TALL]
        assert set(found.layer(TALL)["status"].values()) == {"NOT_CONVERGED"}
        assert "float64" in found.layer(TALL)["notes"][0]


@pytest.mark.parametrize("size", [1e-300, 1e300, 1e38, 1e-38])
def test_a_start_at_the_ends_of_a_format_is_exact_or_refused(tmp_path: Path, size: float) -> None:
    dtype = torch.float64 if size in (1e300, 1e-300) else torch.float32
    large = {name: (50 * row.double() * size).to(dtype) for name, row in weights(0).items()}
    base = save_model(tmp_path / "base", large)
    out = tmp_path / "out"
    found = run("init-adapter", base, "--method", "pissa", "-r", "2", "-o", out, "--json")
    if found.code:
        assert found.code == 1
        assert "Traceback" not in found.err
        assert "model.layers." in found.err.splitlines()[-1]
        assert not (out / "adapter").exists()
    else:
        assert "Infinity" not in found.out
        assert run("verify-adapter", out).code == 0
