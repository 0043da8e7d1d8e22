"""From files to a report: does `follow` find what the run was made of?"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geoscope.errors import NumericsError, OptionError
from geoscope.records import Report
from geoscope.trajectory.backtest import backtest
from geoscope.trajectory.extrapolators import EXTRAPOLATORS
from geoscope.trajectory.increments import Increments
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from tests.helpers.runs import GPT2, LLAMA, Run, lora_run, same_numbers, steps_of

Q, DOWN = list(LLAMA)[:2]
IRREGULAR = (0, 5, 10, 40, 50, 120, 300, 1000)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def report(run: Run, *, base: bool = True, **options: object) -> Report:
    given = {"base": str(run.base) if base else None, "jobs": 1, **options}
    return follow([run.folder], options=FollowOptions(**given))  # pyright: ignore[reportArgumentType]


def model(found: Report, key: str) -> float:
    value = found.summary.model[key]
    assert value is not None
    return value


def verdict(found: Report) -> str:
    assert found.summary.verdict is not None
    return found.summary.verdict.code


def plain_bytes(found: Report) -> str:
    """The report without what differs between two runs of one command."""
    return dataclasses.replace(
        found, provenance=dataclasses.replace(found.provenance, argv=(), seconds=0.0)
    ).dumps()


# --- what a run is made of ----------------------------------------------------------------------


@DTYPES
def test_a_walk_has_no_drift(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every statistic is that of its null, high as it may be."""
    found = report(Run.write(tmp_path, dtype=dtype, rho=0.03))
    assert verdict(found) == "NO_DRIFT"
    assert found.coverage.status == "COMPLETE"
    assert model(found, "drift_fraction_corrected") == pytest.approx(0, abs=0.02)
    for key in ("temporal_pc1", "linear_r2", "linear_r2_origin", "straightness"):
        assert model(found, key) == pytest.approx(found.summary.nulls[key], abs=0.05), key
    assert found.summary.nulls["temporal_pc1"] == pytest.approx(0.8130, abs=2e-3)
    assert model(found, "skill@auto") <= 0.02
    assert model(found, "horizon") == 0


@DTYPES
def test_a_drift_is_found_and_foretold(tmp_path: Path, dtype: torch.dtype) -> None:
    """Drift as large as the noise of one interval: φ = ½."""
    run = Run.write(tmp_path, drift=10**-0.5, dtype=dtype, rho=0.03)
    found = report(run)
    assert verdict(found) == "DRIFT"
    for key in ("drift_fraction_corrected", "increment_cosine_corrected"):
        assert model(found, key) == pytest.approx(0.5, abs=0.03), key
    assert model(found, "skill@damped(linear)") > 0.5
    assert model(found, "horizon") >= 10


@pytest.mark.parametrize("steps", [tuple(range(0, 90, 10)), IRREGULAR])
def test_an_exact_line_is_exact_at_any_spacing(tmp_path: Path, steps: tuple[int, ...]) -> None:
    found = report(Run.write(tmp_path, steps, drift=0.01, noise=0.0, dtype=torch.float64))
    for key in ("drift_fraction", "increment_cosine", "straightness", "temporal_pc1",
                "rank1_coefficient_r2", "linear_r2", "linear_r2_origin", "skill@linear",
                "skill@two_point"):  # fmt: skip
        assert model(found, key) == pytest.approx(1, abs=1e-9), key
    assert model(found, "curvature") == pytest.approx(0, abs=1e-7)


def test_numbers_are_those_of_the_dense_weights(tmp_path: Path) -> None:
    run = Run.write(tmp_path, IRREGULAR, drift=0.3, dtype=torch.bfloat16, shards=3)
    found = report(run)
    assert found.summary.steps == run.steps
    assert {layer.name for layer in found.layers} == set(LLAMA)
    for layer in found.layers:
        W = run.stack(layer.name)
        taken = W.diff(dim=0)
        H = torch.tensor(layer.gram, dtype=torch.float64)
        torch.testing.assert_close(H, taken @ taken.T, rtol=1e-11, atol=1e-12)
        last = (W[-1] - W[0]).reshape(layer.shape)
        S = torch.linalg.svdvals(last)
        assert layer.values["rank1_share_last"] == pytest.approx(
            float(S[0] ** 2 / S.square().sum()), rel=1e-6
        )
        assert layer.values["relative_update"] == pytest.approx(
            float(last.norm() / W[0].norm()), rel=1e-9
        )


def test_conv1d_is_followed_as_out_by_in(tmp_path: Path) -> None:
    plain = report(Run.write(tmp_path / "llama", drift=0.2, dtype=torch.bfloat16))
    turned = report(Run.write(tmp_path / "gpt2", drift=0.2, dtype=torch.bfloat16, names=GPT2))
    assert {one.shape for one in turned.layers} == set(LLAMA.values())
    by_shape = sorted(plain.layers, key=lambda one: (one.layer or 0, one.shape))
    its = sorted(turned.layers, key=lambda one: (one.layer or 0, one.shape))
    assert [one.shape for one in by_shape] == [one.shape for one in its]
    same_numbers(
        dataclasses.replace(plain, layers=tuple(by_shape)),
        dataclasses.replace(turned, layers=tuple(its)), rel=1e-7, skip=("horizon",),
    )  # fmt: skip


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("from_zero", [True, False])
def test_adapters_are_followed_like_their_merged_weights(tmp_path: Path, from_zero: bool) -> None:
    """The path from factors equals the dense one; one that did not start at zero with its start."""
    steps = (0, 10, 20, 60, 70, 100)
    merged, folder, initial = lora_run(tmp_path, steps, from_zero=from_zero)
    start = None if from_zero else str(initial)
    options = FollowOptions(base=str(merged.base), initial_adapter=start, jobs=1)
    low = follow([str(folder)], options=options)
    dense = report(merged)
    names = [f"{layer.name}.weight" for layer in low.layers]
    assert names == [layer.name for layer in dense.layers]
    noise = ("precision_ratio", "step_precision_ratio")  # factors have no rounding of weights
    same_numbers(low, dense, rel=1e-5, skip=noise)
    assert low.summary.steps == steps
    assert verdict(low) == verdict(dense)


def test_the_unchanged_adapter_at_the_start_makes_no_difference(tmp_path: Path) -> None:
    _, folder, initial = lora_run(tmp_path, (0, 10, 20, 30), from_zero=True)
    alone = follow([str(folder)], options=FollowOptions(jobs=1))
    with_start = follow([str(folder)], options=FollowOptions(initial_adapter=str(initial), jobs=1))
    same_numbers(alone, with_start, rel=1e-9)


def test_an_initialisation_that_says_so_needs_its_start(tmp_path: Path) -> None:
    _, folder, _ = lora_run(tmp_path, (0, 10, 20), from_zero=False)
    config = folder / "checkpoint-10/adapter_config.json"
    config.write_text(config.read_text().replace("true", '"pissa_niter_4"'))
    with pytest.raises(OptionError, match="`initial_adapter`"):
        follow([str(folder)])


def test_a_rewritten_base_needs_the_start_of_its_adapters(tmp_path: Path) -> None:
    """The base says what the configuration of an adapter does not."""
    _, folder, initial = lora_run(tmp_path, (0, 10, 20, 30), from_zero=False)
    residual = tmp_path / "out/residual"
    residual.mkdir(parents=True)
    record = {"schema": "geoscope.adapter/1", "layout": "residual"}
    (residual.parent / "geoscope.json").write_text(json.dumps(record))
    for config in folder.glob("*/adapter_config.json"):
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "base_model_name_or_path": str(residual)}))
    with pytest.raises(OptionError, match=r"residual is a rewritten one.* `initial_adapter`"):
        follow([str(folder)])
    follow([str(folder)], options=FollowOptions(initial_adapter=str(initial), jobs=1))


def test_updates_that_need_the_base_ask_for_it(tmp_path: Path) -> None:
    _, folder, _ = lora_run(tmp_path, (0, 10, 20), from_zero=True)
    for path in folder.glob("checkpoint-*"):
        weights = path / "adapter_model.safetensors"
        tensors = load_file(weights)
        for name in list(tensors):
            if name.endswith(".lora_B.weight"):
                norms = torch.ones(len(tensors[name]))
                tensors[name.replace(".lora_B.weight", ".lora_magnitude_vector")] = norms
        save_file(tensors, weights)
        config = path / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(OptionError, match=r"of DoRA cannot be computed without .* `base`$"):
        follow([str(folder)])


# --- arguments ----------------------------------------------------------------------------------


def test_the_order_of_the_arguments_changes_no_byte(tmp_path: Path) -> None:
    run = Run.write(tmp_path, (0, 40, 200, 1000, 1010), drift=0.2)
    given = steps_of(run.points)
    first = plain_bytes(follow(given, options=FollowOptions(base=str(run.base), jobs=1)))
    for seed in range(2):
        random.Random(seed).shuffle(given)
        again = follow(given, options=FollowOptions(base=str(run.base), jobs=1))
        assert plain_bytes(again) == first


def test_steps_by_hand_stand_for_the_names(tmp_path: Path) -> None:
    run = Run.write(tmp_path, (0, 10, 20, 50, 100), drift=0.2)
    named = report(run)
    places = [one.rename(one.with_name(name)) for one, name in zip(run.points, "dbca", strict=True)]
    by_hand = follow(
        steps_of([places[i] for i in (3, 0, 2, 1)]),
        options=FollowOptions(base=str(run.base), steps="100,10,50,20", jobs=1),
    )
    assert by_hand.summary.steps == (0, 10, 20, 50, 100)
    same_numbers(named, by_hand, rel=0)


def test_without_a_base_it_is_the_first_checkpoint(tmp_path: Path) -> None:
    """H of the others is the same; the base stands at its own step."""
    run = Run.write(tmp_path, (0, 30, 40, 60, 70), drift=0.2)
    found = report(run, base=False)
    assert found.summary.steps == (30, 40, 60, 70)
    whole = torch.tensor(report(run).layers[0].gram)
    torch.testing.assert_close(torch.tensor(found.layers[0].gram), whole[1:, 1:])
    assert found.provenance.refs[0].given.endswith("checkpoint-30")


def test_a_first_step_of_zero_is_the_base(tmp_path: Path) -> None:
    run = Run.write(tmp_path, (0, 10, 20, 30), drift=0.2)
    shutil.copytree(run.base, run.points[0].with_name("checkpoint-0"))
    same_numbers(report(run, base=False, include=("layers",)),
                 follow(steps_of(run.points), options=FollowOptions(
                     base=str(run.base), jobs=1, include=("layers",))), rel=0,
                 skip=("drift", "increment", "precision", "step_precision"))  # fmt: skip


def test_one_checkpoint_is_no_series(tmp_path: Path) -> None:
    run = Run.write(tmp_path, (0, 10))
    with pytest.raises(OptionError, match="one checkpoint makes no series"):
        report(run, base=False)
    assert verdict(report(run)) == "UNDETERMINED"


@pytest.mark.parametrize("directions", [True, False])
def test_workers_change_no_number(tmp_path: Path, directions: bool) -> None:
    run = Run.write(tmp_path, drift=0.3, dtype=torch.bfloat16)
    one, two = (plain_bytes(report(run, jobs=jobs, directions=directions)) for jobs in (1, 2))
    assert one == two
    assert ("sigma1" in one) == directions


# --- what is missing ----------------------------------------------------------------------------


def without_q(run: Run, at: int, value: torch.Tensor | None) -> None:
    """Writes one checkpoint anew, q_proj of layer 0 replaced or left out."""
    weights = {name: W for name, W in run.models[at].items() if name != Q}
    if value is not None:
        weights[Q] = value
    Run.of(run.base.parent, (0, run.steps[at]), [run.models[0], weights], shards=2)


@pytest.mark.parametrize("value", [None, torch.ones(3, 5)], ids=["missing", "reshaped"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_tensor_without_a_series_is_listed(
    tmp_path: Path, value: torch.Tensor | None, at: int
) -> None:
    run = Run.write(tmp_path, (0, 10, 20, 30, 40), drift=0.2)
    without_q(run, at, value)
    found = report(run)
    assert found.coverage.status == "PARTIAL"
    assert found.coverage.missing == (Q,)
    assert {layer.name for layer in found.layers} == set(LLAMA) - {Q}


def test_a_tensor_that_the_base_lacks_is_listed(tmp_path: Path) -> None:
    run = Run.write(tmp_path, (0, 10, 20, 30), drift=0.2)
    weights = dict(run.models[0])
    del weights[DOWN]
    for path in run.base.glob("model*"):
        path.unlink()
    Run.of(tmp_path, (0,), [weights])
    assert report(run).coverage.missing == (DOWN,)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_names_tensor_and_step(tmp_path: Path, at: int, value: float) -> None:
    run = Run.write(tmp_path, (0, 10, 20, 30), drift=0.2, shards=2)
    broken = run.models[at][DOWN].clone()
    broken[3, 5] = value
    places = [run.base, *run.points]
    weights = {**run.models[at], DOWN: broken}
    Run.of(tmp_path / "new", (0, 1), [weights, weights], shards=2)
    shutil.rmtree(places[at])
    shutil.copytree(tmp_path / "new/base", places[at])
    found = report(run)
    assert found.coverage.missing == (DOWN,)
    (reason,) = [one.reason for one in found.coverage.skipped if one.name == DOWN]
    assert reason == f"NON_FINITE: step {run.steps[at]} holds NaN or infinity"
    assert len([one for one in found.layers if one.name != DOWN]) == len(LLAMA) - 1


def test_nothing_left_to_follow_is_an_error(tmp_path: Path) -> None:
    run = Run.write(tmp_path, (0, 10, 20))
    broken = {name: W * torch.nan for name, W in run.models[0].items()}
    Run.of(tmp_path, (0, 10), [run.models[0], broken], shards=2)
    with pytest.raises(NumericsError, match="step 10 holds NaN"):
        report(run)


# --- without the checkpoints --------------------------------------------------------------------


def test_the_backtest_of_the_file_is_that_of_the_weights(tmp_path: Path) -> None:
    """‖ΔŴ − Δ_τ‖² from H as saved equals that of dense predictions; skill@… follows from it."""
    run = Run.write(tmp_path, (0, 10, 20, 40, 50, 90, 100), drift=0.3, dtype=torch.bfloat16)
    path = tmp_path / "report.json"
    path.write_text(report(run).dumps())
    shutil.rmtree(run.folder)
    saved = Report.loads(path.read_text())
    steps = tuple(map(float, saved.summary.steps))
    kept = {
        layer.name: Increments(
            steps, torch.tensor(layer.gram, dtype=torch.float64), (0.0,) * len(steps), 1.0
        )
        for layer in saved.layers
    }
    test = backtest(kept)
    for method in ("two_point", "linear", "linear_origin", "relex", "relex_pinned"):
        direct = torch.stack([_errors(run, name, method, test.pairs) for name in kept])
        torch.testing.assert_close(test.error(method), direct, rtol=1e-6, atol=0)
        assert test.skill(method) == pytest.approx(model(saved, f"skill@{method}"), abs=1e-9)


def _errors(run: Run, name: str, method: str, pairs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    W = run.stack(name)
    updates = W[1:] - W[0]
    found = []
    for o, tau in pairs:
        taken = W[: o + 1].diff(dim=0)
        seen = Increments(
            tuple(map(float, run.steps[: o + 1])), taken @ taken.T, (0.0,) * (o + 1), 1.0
        )
        weights = EXTRAPOLATORS[method].weights(seen, run.steps[tau])
        found.append(float((weights @ updates[:o] - updates[tau - 1]).square().sum()))
    return torch.tensor(found, dtype=torch.float64)
