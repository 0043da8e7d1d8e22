"""A series of adapters foretold: against the prediction of the same run as merged models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.errors import OptionError, PairingError
from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.options import FollowOptions
from tests.helpers import tiny_models
from tests.helpers.running import run as command
from tests.helpers.runs import LLAMA, Run, adapter, lora_run

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
STEPS = (0, 10, 20, 30, 50, 70, 80)
METHODS = (
    "hold", "two-point", "linear", "relex-pinned", "damped", "alpha-rank1", "spatial-rank1-pinned",
    "damped(spatial_rank1_pinned)", "auto",
)  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["from zero", "from a start"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path, Path | None]:
    """The merged run, the adapters, and where they started if not at zero."""
    models, series, initial = lora_run(
        tmp_path_factory.mktemp("lora"), STEPS, from_zero=request.param
    )
    return models, series, None if request.param else initial


def update_of(folder: Path) -> dict[str, Tensor]:
    """s·B·A of each weight, dense, in fp64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in LLAMA:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        B, A = (tensors[f"{prefix}.lora_{side}.weight"].double() for side in "BA")
        found[name] = config["lora_alpha"] / config["r"] * B @ A
    return found


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_prediction_of_the_merged_run(
    case: tuple[Run, Path, Path | None], method: str, tmp_path: Path
) -> None:
    models, series, initial = case
    whole = extrapolate(
        [str(models.folder)], 100, tmp_path / "model", method=method, force=True,
        options=FollowOptions(base=str(models.base)),
    )  # fmt: skip
    alone = extrapolate(
        [str(series)], 100, tmp_path / "adapter", method=method, force=True, rank=36,
        options=FollowOptions(
            base=str(models.base), initial_adapter=None if initial is None else str(initial)
        ),
    )  # fmt: skip
    assert alone.rank == 36 and (alone.discarded or 0) < 1e-12
    assert alone.skill == pytest.approx(whole.skill, abs=1e-6)
    tensors = {
        k: v
        for one in (tmp_path / "model").glob("*.safetensors")
        for k, v in load_file(one).items()
    }
    for name, update in update_of(tmp_path / "adapter").items():
        expected = tensors[name].double() - models.models[0][name].double()
        error = float((update - expected).norm() / expected.norm())
        assert error < 2e-6, name


def test_a_smaller_rank_is_the_best_approximation(
    case: tuple[Run, Path, Path | None], tmp_path: Path
) -> None:
    models, series, initial = case
    options = FollowOptions(
        base=str(models.base), initial_adapter=None if initial is None else str(initial)
    )
    whole = {}
    for rank in (36, 3):
        made = extrapolate(
            [str(series)], 100, tmp_path / str(rank), method="linear", force=True, rank=rank,
            options=options,
        )  # fmt: skip
        whole[rank] = update_of(tmp_path / str(rank)), made.discarded
    left = energy = 0.0
    for name, update in whole[36][0].items():
        U, S, Vh = torch.linalg.svd(update)
        best = U[:, :3] * S[:3] @ Vh[:3]
        assert float((whole[3][0][name] - best).norm() / best.norm()) < 1e-5
        left, energy = left + float(S[3:].square().sum()), energy + float(S.square().sum())
    assert whole[3][1] == pytest.approx(left / energy, rel=1e-4)


def test_peft_loads_it(tmp_path: Path) -> None:
    """Of a run along a line: the next step is known, and is what PEFT computes."""
    peft = pytest.importorskip("peft")
    base = tiny_models.llama(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"model.layers.{layer}.self_attn.{leaf}": shape
        for layer in range(2)
        for leaf, shape in (("q_proj", (16, 16)), ("v_proj", (8, 16)))
    }
    speed = {
        name: (torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator))
        for name, (m, n) in modules.items()
    }
    settings = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    for step in (10, 20, 30, 40):
        factors = {name: (1e-3 * step * B, A) for name, (B, A) in speed.items()}
        adapter(tmp_path / f"run/checkpoint-{step}", factors, alpha=4, **settings)
    done = command(
        "extrapolate", tmp_path / "run", "--to-step", "60", "--method", "linear", "--force",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "4, which leaves out" in done.out
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = peft.PeftModel.from_pretrained(tiny_models.live(base), tmp_path / "out").eval()
    true = adapter(
        tmp_path / "true",
        {name: (6e-2 * B, A) for name, (B, A) in speed.items()},
        alpha=4,
        **settings,
    )
    expected = peft.PeftModel.from_pretrained(tiny_models.live(base), true).eval()
    tiny_models.assert_same_logits(tiny_models.logits(found), tiny_models.logits(expected))
    again = command("capacity", tmp_path / "out")
    assert again.code == 0, again.err
    checked = command("verify-adapter", tmp_path / "out")
    assert checked.code == 0, checked.err


def test_what_cannot_be_written_is_refused(
    case: tuple[Run, Path, Path | None], tmp_path: Path
) -> None:
    models, series, initial = case
    start = None if initial is None else str(initial)
    options = FollowOptions(base=str(models.base), initial_adapter=start)
    for method, rank in (("next", None), ("linear", 65), ("linear", 0)):
        with pytest.raises(OptionError, match=r"`method` next|`rank`"):
            extrapolate(
                [str(series)], 100, tmp_path / "out", method=method, rank=rank, force=True,
                options=options,
            )  # fmt: skip
    with pytest.raises(OptionError, match="whole models"):
        extrapolate(
            [str(models.folder)], 100, tmp_path / "out", rank=4, force=True,
            options=FollowOptions(base=str(models.base)),
        )  # fmt: skip
    if initial is not None:
        with pytest.raises(OptionError, match="give that as `base`"):
            extrapolate(
                [str(series)], 100, tmp_path / "out", force=True,
                options=FollowOptions(initial_adapter=start),
            )  # fmt: skip
    some = FollowOptions(base=str(models.base), initial_adapter=start, exclude=("down_proj",))
    with pytest.raises(PairingError, match="not followed"):
        extrapolate([str(series)], 100, tmp_path / "out", method="hold", force=True, options=some)
    assert not (tmp_path / "out").exists()


def test_what_is_predicted_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    _, series, _ = lora_run(tmp_path, STEPS, from_zero=True)
    out = series / "checkpoint-100"
    extrapolate([str(series)], 100, out, method="hold", force=True, options=with_base(tmp_path))
    found = command("trajectory", series, "--json", "--no-directions").report
    assert found["summary"]["steps"][-1] == 80
    assert any("predicted by extrapolate" in one["reason"] for one in found["coverage"]["skipped"])
    assert not found["coverage"]["missing"]
    done = command("extrapolate", series, "--to-step", "120", "--method", "hold", "--force",
                   "--base", tmp_path / "merged/base", "--out", series)  # fmt: skip
    assert done.code == 1 and "never written to" in done.err


def with_base(root: Path) -> FollowOptions:
    return FollowOptions(base=str(next(root.glob("merged/*base*"))))


def test_bases_that_are_none_of_the_run(tmp_path: Path) -> None:
    models, series, _ = lora_run(tmp_path, STEPS, from_zero=True)
    step = next(series.iterdir())
    done = command("trajectory", series, "--base", f"{models.base}+{step}")
    assert done.code == 2 and "give that as --base" in done.err
    other = Run.write(tmp_path / "other", (0, 10, 20))
    tensors = load_file(next(other.base.glob("*.safetensors")))
    assert tensors
    for path in other.base.glob("*.safetensors"):
        save_file({k: v[:8].contiguous() for k, v in load_file(path).items()}, path)
    done = command("trajectory", series, "--base", other.base)
    assert done.code == 1 and "give the model that it was trained on" in done.err
    for words in (("--scalar-r2", "all"),):
        assert command("trajectory", series, *words).code == 2
