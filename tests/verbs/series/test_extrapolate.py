"""The written model: the arithmetic asked for in the dtype of the input, the rest byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from geoscope.errors import CheckpointError, OptionError
from geoscope.verbs.series.extrapolate import extrapolate, methods
from geoscope.verbs.series.extrapolation import Extrapolation
from geoscope.verbs.series.options import FollowOptions
from tests.helpers.runs import GPT2, LLAMA, Run, stored

STEPS = (0, 10, 20, 30, 50, 60, 100)
TARGET = 130
Q = next(iter(LLAMA))
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def predicted(run: Run, out: Path, method: str, *, force: bool = True, to: int = TARGET,
              **options: str) -> Extrapolation:  # fmt: skip
    given = FollowOptions(base=str(run.base), jobs=1, **options)  # pyright: ignore[reportArgumentType]
    return extrapolate([run.folder], to, out, method=method, options=given, force=force)


def expected(W: np.ndarray, steps: tuple[int, ...], method: str, target: float) -> np.ndarray:
    """The formulas of docs/methods.md#extrapolators on rows W_0 … W_T, written out in numpy."""
    t = np.array(steps[1:], dtype=float)
    moved = W[1:] - W[0]
    if method == "hold":
        return W[-1]
    if method == "two_point":
        return W[0] + target / t[-1] * moved[-1]
    if method == "linear":
        slope, level = np.polyfit(t, moved, 1)
        return W[0] + level + slope * target
    if method == "linear_origin":
        return W[0] + target * (t @ moved) / (t @ t)
    # RELEX: the stack's leading right vector, its coefficients by a line
    U, S, Vt = np.linalg.svd(moved, full_matrices=False)
    c = U[:, 0] * S[0]
    relex = np.polyval(np.polyfit(t, c, 1), target) * Vt[0]
    if method == "relex":
        return W[0] + relex
    assert method == "relex_pinned"
    return W[-1] + relex - c[-1] * Vt[0]


def assert_stored(found: torch.Tensor, exact: np.ndarray, dtype: torch.dtype) -> None:
    """Equal to `exact` rounded to the dtype, but for ties: at most a millionth of the entries."""
    assert found.dtype == dtype
    wanted = torch.from_numpy(exact).reshape(found.shape).to(dtype)
    spacing = torch.finfo(dtype).eps * wanted.double().abs().clamp_min(1e-6)
    assert bool(((found.double() - wanted.double()).abs() <= spacing).all())
    assert int((found != wanted).sum()) <= 1 + found.numel() // 1000


# --- what is written ----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    "method", ["two_point", "linear", "linear_origin", "relex", "relex_pinned"]
)
def test_predicted_weights_are_those_of_numpy(
    tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.3, dtype=dtype)
    made = predicted(run, tmp_path / "out", method)
    assert made.counts == {method: len(LLAMA)}
    found = stored(tmp_path / "out")
    for name in LLAMA:
        exact = expected(run.stack(name).numpy(), run.steps, method, TARGET)
        assert found[name].shape == LLAMA[name]
        assert_stored(found[name], exact, dtype)


@pytest.mark.parametrize("method", ["linear", "two_point", "relex"])
def test_damped_goes_the_learned_part_of_the_way(tmp_path: Path, method: str) -> None:
    """W_T + λ(Ŵ − W_T), λ* of all pairs o < τ ≤ T from o ≥ ⌈T/3⌉, on the weights themselves."""
    run = Run.write(tmp_path, STEPS, drift=0.3)
    predicted(run, tmp_path / "out", f"damped({method})")
    T = len(STEPS) - 1
    up = down = 0.0
    for name in LLAMA:
        W = run.stack(name).numpy()
        for o in range(max(2, -(-T // 3)), T):
            for tau in range(o + 1, T + 1):
                D = expected(W[: o + 1], STEPS[: o + 1], method, STEPS[tau]) - W[o]
                up += D @ (W[tau] - W[o])
                down += D @ D
    factor = min(1.0, max(0.0, up / down))
    assert 0.2 < factor < 1
    record = json.loads((tmp_path / "out/geoscope.json").read_text())
    assert record["factors"][method] == pytest.approx(factor, rel=1e-9)
    found = stored(tmp_path / "out")
    for name in LLAMA:
        W = run.stack(name).numpy()
        exact = W[-1] + factor * (expected(W, STEPS, method, TARGET) - W[-1])
        assert_stored(found[name], exact, torch.float32)


def test_alpha_rank1_restores_the_norm(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.3)
    predicted(run, tmp_path / "out", "alpha-rank1")
    found = stored(tmp_path / "out")
    for name, shape in LLAMA.items():
        W = run.stack(name)
        moved = (W[-1] - W[0]).reshape(shape)
        U, _, Vh = torch.linalg.svd(moved)
        exact = W[0].reshape(shape) + moved.norm() * torch.outer(U[:, 0], Vh[0])
        torch.testing.assert_close(found[name].double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["spatial_rank1", "spatial_rank1_pinned"])
def test_a_straight_rank_one_path_goes_on(tmp_path: Path, method: str) -> None:
    """Δ = t·u·vᵀ: both give the next point of the line."""
    steps = (0, 10, 20, 40, 80)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in LLAMA.items()}
    pairs = {
        name: torch.outer(*(torch.randn(n, generator=generator) for n in shape))
        for name, shape in LLAMA.items()
    }
    models = [{name: base[name] + 1e-3 * t * pairs[name] for name in base} for t in steps]
    run = Run.of(tmp_path, steps, models)
    predicted(run, tmp_path / "out", method)
    found = stored(tmp_path / "out")
    for name in LLAMA:
        exact = base[name] + 1e-3 * TARGET * pairs[name]
        torch.testing.assert_close(found[name], exact, rtol=1e-4, atol=1e-5)


def test_a_pinned_pair_leaves_the_rest_of_the_last_update(tmp_path: Path) -> None:
    """W_T + Ẑ − σ1·u1·v1ᵀ of Δ_T, where the plain one is W_0 + Ẑ: as in the backtest."""
    run = Run.write(tmp_path, STEPS, drift=0.3)
    predicted(run, tmp_path / "plain", "spatial_rank1")
    predicted(run, tmp_path / "pinned", "spatial_rank1_pinned")
    plain, pinned = stored(tmp_path / "plain"), stored(tmp_path / "pinned")
    for name, shape in LLAMA.items():
        W = run.stack(name)
        moved = (W[-1] - W[0]).reshape(shape)
        U, S, Vh = torch.linalg.svd(moved)
        rest = moved - S[0] * torch.outer(U[:, 0], Vh[0])
        found = pinned[name].double() - plain[name].double()
        torch.testing.assert_close(found, rest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extend", [(float("nan"),), (1.0, float("inf")), (0.5, 0.5)])
def test_factors_of_the_family_are_finite_and_differ(
    tmp_path: Path, extend: tuple[float, ...]
) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.3)
    with pytest.raises(OptionError, match="finite numbers, each once"):
        extrapolate([run.folder], TARGET, tmp_path / "out", method="next", extend=extend)
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.3)
    file = next(run.points[1].glob("*.safetensors"))
    broken = load_file(file)
    broken[Q][0, 0] = torch.nan
    save_file(broken, file, metadata={"format": "pt"})
    made = predicted(run, tmp_path / "out", "linear")
    note = next(one for one in made.notes if one.startswith(Q))
    assert note.endswith("copied")
    assert note in json.loads((tmp_path / "out/geoscope.json").read_text())["notes"]
    assert_same_bytes(tmp_path / "out", run.points[-1], {Q})


@DTYPES
def test_hold_copies_the_bytes_of_the_last_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.3, dtype=dtype)
    made = predicted(run, tmp_path / "out", "hold", force=False)
    assert made.counts == {"hold": len(LLAMA)}
    assert_same_bytes(tmp_path / "out", run.points[-1], set(run.models[-1]))


def assert_same_bytes(one: Path, other: Path, names: set[str]) -> None:
    left, right = stored(one), stored(other)
    assert left.keys() == right.keys()
    for name in names:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


def test_what_is_not_followed_is_copied_from_the_last_checkpoint(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.3, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "generation_config.json"):
        (run.points[-1] / name).write_text("{}")
    (run.points[-1] / "trainer_state.json").write_text("{}")
    predicted(run, tmp_path / "out", "linear", exclude=("layers.1.",))  # pyright: ignore[reportArgumentType]
    untouched = {name for name in run.models[-1] if name not in list(LLAMA)[:2]}
    assert_same_bytes(tmp_path / "out", run.points[-1], untouched)
    held = stored(run.points[-1])
    assert not torch.equal(stored(tmp_path / "out")[Q], held[Q])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "geoscope.json"} <= names
    assert "trainer_state.json" not in names
    config = (tmp_path / "out/config.json").read_bytes()
    assert config == (run.points[-1] / "config.json").read_bytes()


def test_conv1d_is_written_as_it_lay(tmp_path: Path) -> None:
    run = Run.write(tmp_path / "gpt2", STEPS, drift=0.3, names=GPT2)
    for method in ("linear", "alpha_rank1"):
        predicted(run, tmp_path / method, method)
    linear, alpha = (stored(tmp_path / method) for method in ("linear", "alpha_rank1"))
    for name, shape in LLAMA.items():
        W = run.stack(GPT2[name])
        lying = shape[::-1]
        assert linear[GPT2[name]].shape == alpha[GPT2[name]].shape == lying
        exact = expected(W.numpy(), STEPS, "linear", TARGET)
        assert_stored(linear[GPT2[name]], exact, torch.float32)
        moved = (W[-1] - W[0]).reshape(lying)
        U, _, Vh = torch.linalg.svd(moved)
        rank1 = W[0].reshape(lying) + moved.norm() * torch.outer(U[:, 0], Vh[0])
        torch.testing.assert_close(alpha[GPT2[name]].double(), rank1, rtol=1e-5, atol=1e-6)


def test_auto_takes_each_matrix_its_method_and_says_which(tmp_path: Path) -> None:
    """Three matrices drift and one walks."""
    drifting = Run.write(tmp_path / "drift", tuple(range(0, 130, 10)), drift=1.0)
    walking = Run.write(tmp_path / "walk", drifting.steps, seed=3)
    models = [
        {name: (b if name == Q else a)[name] for name in a}
        for a, b in zip(drifting.models, walking.models, strict=True)
    ]
    run = Run.of(tmp_path / "both", drifting.steps, models)
    made = predicted(run, tmp_path / "out", "auto", force=False, to=130)
    moved = {name for name, method in made.chosen.items() if method != "hold"}
    assert moved >= set(LLAMA) - {Q}
    assert made.skill is not None
    assert made.skill > 0.3
    record = json.loads((tmp_path / "out/geoscope.json").read_text())
    assert record["tensors"] == dict(made.chosen)
    assert (record["to_step"], record["method"], record["horizon"]) == (130, "auto", made.horizon)
    held = stored(tmp_path / "out")
    for name in set(LLAMA) - moved:
        assert torch.equal(held[name], run.models[-1][name])


# --- what is refused ----------------------------------------------------------------------------


def test_beyond_the_horizon_only_by_force(tmp_path: Path) -> None:
    run = Run.write(tmp_path, tuple(range(0, 130, 10)), drift=1.0)
    near = predicted(run, tmp_path / "near", "damped(linear)", force=False, to=130)
    assert near.horizon >= 10
    assert near.ahead == 10
    far = 120 + int(near.horizon) + 1
    with pytest.raises(OptionError, match=rf"credible only up to {near.horizon:g} steps"):
        predicted(run, tmp_path / "far", "damped(linear)", force=False, to=far)
    assert not (tmp_path / "far").exists()
    assert predicted(run, tmp_path / "far", "damped(linear)", to=far).target == far


def test_a_walk_is_credible_at_no_distance(tmp_path: Path) -> None:
    run = Run.write(tmp_path, tuple(range(0, 130, 10)))
    with pytest.raises(OptionError, match="linear is credible at no distance"):
        predicted(run, tmp_path / "out", "linear", force=False)


def test_few_checkpoints_are_never_credible(tmp_path: Path) -> None:
    run = Run.write(tmp_path, (0, 10, 20), drift=1.0, rho=1e-2)
    with pytest.raises(OptionError, match=r"at no distance \(held-out skill unknown\)"):
        predicted(run, tmp_path / "out", "auto", force=False)


@pytest.mark.parametrize("target", [100, 40])
def test_the_past_is_not_predicted(tmp_path: Path, target: int) -> None:
    run = Run.write(tmp_path, STEPS)
    with pytest.raises(OptionError, match=f"`target` {target}: the series ends at step 100"):
        predicted(run, tmp_path / "out", "hold", to=target)


def test_unknown_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'next_year' is not one of auto, hold"):
        extrapolate(["x"], 10, tmp_path / "out", method="next-year")


def test_no_input_is_written_on(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS)
    before = stored(run.points[-1])
    for place in (run.points[-1], run.base):
        with pytest.raises(CheckpointError):
            predicted(run, place, "hold")
    after = stored(run.points[-1])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", [name for name in methods() if "next" not in name])
def test_every_method_without_networks_writes_a_finite_model(tmp_path: Path, method: str) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.3, dtype=torch.bfloat16)
    predicted(run, tmp_path / "out", method)
    assert all(bool(W.isfinite().all()) for W in stored(tmp_path / "out").values())
