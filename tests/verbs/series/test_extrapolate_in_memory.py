"""extrapolate on tensors: the prediction of the saved files, and nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import geoscope
from geoscope.errors import OptionError
from tests.helpers.matrices import save_model
from tests.helpers.running import weights
from tests.helpers.runs import lora_run

STEPS = (1, 2, 3, 4)


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    """The base and a line of checkpoints."""
    base, tuned = weights(), weights(100)
    return [
        {name: base[name] + i / 4 * (tuned[name] - base[name]) for name in base} for i in range(5)
    ]


@pytest.fixture
def stored(states: list[dict[str, Tensor]], tmp_path: Path) -> tuple[Path, Path]:
    for i, state in enumerate(states[1:], start=1):
        save_model(tmp_path / "run" / f"checkpoint-{i}", state)
    return save_model(tmp_path / "base", states[0]), tmp_path / "run"


@pytest.mark.parametrize("method", ["linear", "hold"])
def test_a_model_in_memory_is_the_written_one(
    states: list[dict[str, Tensor]], stored: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, method: str,
) -> None:  # fmt: skip
    base, run = stored
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    how: Any = {"method": method, "force": True}
    written = geoscope.extrapolate(run, 6, tmp_path / "out", base=base, **how)
    file = load_file(tmp_path / "out" / "model.safetensors")
    assert written.tensors == {}
    made = geoscope.extrapolate(states[1:], 6, base=states[0], steps=STEPS, **how)
    assert same(made.tensors, file) and (made.out, made.folders) == (None, ())
    assert (made.skill, made.horizon, made.chosen) == (
        written.skill, written.horizon, written.chosen,
    )  # fmt: skip
    opened = [geoscope.open_checkpoint(str(run / f"checkpoint-{i}")) for i in STEPS]
    again = geoscope.extrapolate(opened, 6, base=base, steps=STEPS, **how)
    assert same(again.tensors, file)
    own = {one.untyped_storage().data_ptr() for one in made.tensors.values()}
    assert not own & {
        one.untyped_storage().data_ptr() for state in states for one in state.values()
    }
    assert list((tmp_path / "here").iterdir()) == []
    geoscope.extrapolate(states[1:], 6, tmp_path / "live", base=states[0], steps=STEPS, **how)
    assert same(load_file(tmp_path / "live" / "model.safetensors"), file)


def test_a_family_in_memory_is_a_model_for_each_factor(states: list[dict[str, Tensor]]) -> None:
    how: Any = {"base": states[0], "steps": STEPS, "method": "next", "training": 2, "force": True}
    made = geoscope.extrapolate(states[1:], 6, extend=(0.0, 1.0), **how)
    plain = geoscope.extrapolate(states[1:], 6, **how)
    assert len(made.models) == 2 and same(made.models[1], plain.tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(made.models[0][name], states[-1][name])
    assert not torch.equal(made.models[1][name], states[-1][name])


def test_adapters_in_memory_give_the_written_adapter(tmp_path: Path) -> None:
    models, series, start = lora_run(tmp_path, (20, 40, 60, 80), from_zero=False)
    points = sorted(series.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    how: Any = {"method": "linear", "force": True}
    if start is not None:
        how["initial_adapter"] = start
    geoscope.extrapolate(series, 100, tmp_path / "out", base=models.base, **how)
    adapters = [
        geoscope.open_adapter(
            load_file(point / "adapter_model.safetensors"),
            json.loads((point / "adapter_config.json").read_text(encoding="utf-8")),
        )
        for point in points
    ]
    steps = [int(point.name[11:]) for point in points]
    state = load_file(models.base / "model.safetensors")
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for base in (models.base, state):
        made = geoscope.extrapolate(adapters, 100, base=base, steps=steps, **how)
        assert same(made.tensors, file) and made.config is not None
        assert made.rank == made.config["r"] > 0


def test_errors_name_their_parameter(states: list[dict[str, Tensor]]) -> None:
    loose: Any = geoscope.extrapolate
    for text, named in (
        ("^`target` '6'", {"target": "6", "steps": STEPS}),
        ("^`target` 2", {"target": 2, "steps": STEPS}),
        ("^`steps`: one number for each of the 4", {"target": 6}),
        ("'stepz' is not an option.*steps meant", {"target": 6, "stepz": STEPS}),
        ("^`rank` 'a'", {"target": 6, "steps": STEPS, "rank": "a"}),
    ):
        with pytest.raises(OptionError, match=text):
            loose(states[1:], base=states[0], **named)
