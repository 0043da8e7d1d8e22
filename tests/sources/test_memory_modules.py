"""Modules of torch, transformers and PEFT in place of what they save."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import geoscope
from geoscope.errors import OptionError, UnsupportedFormat
from geoscope.peft.adapted import AdaptedCheckpoint
from tests.helpers.peft_adapters import MODELS, peft, quietly
from tests.helpers.tiny_models import live, llama, qwen2_tied

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers


def facts(report: geoscope.Report) -> str:
    found = report.to_json()
    del found["provenance"]
    return json.dumps(found, sort_keys=True)


def shaken(model: nn.Module, *, seed: int = 1, size: float = 1e-3) -> nn.Module:
    """A copy with every parameter moved."""
    moved = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float32)
            parameter.add_((size * noise).to(parameter.dtype))
    return moved


def adapted(model: Any, **config: Any) -> Any:
    """A copy under LoRA whose factors are drawn."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=draws))
    return wrapped


@pytest.mark.parametrize("make", [llama, qwen2_tied])
def test_a_module_of_transformers_gives_the_report_of_its_folder(tmp_path: Path, make: Any) -> None:
    base = live(make(tmp_path / "base"))
    tuned: Any = shaken(base)
    tuned.save_pretrained(tmp_path / "tuned")
    found = geoscope.compare(base, tuned)
    assert facts(found) == facts(geoscope.compare(tmp_path / "base", tmp_path / "tuned"))
    assert found.provenance.refs[0].given == f"base ({type(base).__name__})"
    assert found.provenance.refs[1].storage_dtype == "float32"


def test_wrappers_of_a_model_are_taken_off(tmp_path: Path) -> None:
    base = live(llama(tmp_path / "base"))
    tuned = shaken(base)
    plain = facts(geoscope.collapse(base, tuned))
    assert facts(geoscope.collapse(base, nn.DataParallel(tuned))) == plain
    with warnings.catch_warnings():  # of torch, about a module of its own
        warnings.simplefilter("ignore")
        compiled = torch.compile(base)
    assert facts(geoscope.collapse(compiled, tuned)) == plain  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_a_wrapped_model_gives_the_report_of_base_and_adapter(tmp_path: Path, name: str) -> None:
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    base = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    model = adapted(base, target_modules=targets)
    base.save_pretrained(tmp_path / "base")
    quietly(lambda: model.save_pretrained(tmp_path / "adapter"))
    stored = geoscope.compare(tmp_path / "base", tmp_path / "adapter")
    assert facts(geoscope.compare(tmp_path / "base", model)) == facts(stored)
    # its own base, in this process, under LoRA's modules
    assert facts(geoscope.compare(model.get_base_model(), model)) == facts(stored)
    assert facts(geoscope.compare(base, model)) == facts(stored)
    alone = geoscope.capacity(tmp_path / "adapter")
    assert facts(geoscope.capacity(model)) == facts(alone)


def test_an_update_in_memory_is_never_made_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = live(llama(tmp_path / "base"))
    model = adapted(base)
    asked: list[str] = []
    read = AdaptedCheckpoint.read

    def watched(self: AdaptedCheckpoint, name: str, **how: Any) -> torch.Tensor:
        asked.append(name)
        return read(self, name, **how)

    monkeypatch.setattr(AdaptedCheckpoint, "read", watched)
    report = geoscope.anisotropy(base, model)
    assert len(report.layers) == 4 and asked == []
    assert {layer["update.numerical_rank"].value for layer in report.layers} <= {None, 2}
    other = adapted(base, r=3)
    both = geoscope.anisotropy(model, other)  # the difference of two adapters of one base
    assert len(both.layers) == 4
    # W0, which holds the first adapter, is read for its size; the update is not
    assert len(asked) == len(set(asked)) == 4


def test_an_adapter_over_another_base_is_compared_whole(tmp_path: Path) -> None:
    base = live(llama(tmp_path / "base"))
    model = adapted(shaken(base))
    found = geoscope.compare(base, model, kind="collapse")
    merged = copy.deepcopy(model).double().merge_and_unload()
    wanted = geoscope.compare(base, merged, kind="collapse")
    for layer in found.layers:
        if layer.name.endswith(("q_proj.weight", "down_proj.weight")):
            expected = wanted.layers[layer.name]["relative_update"].value
            assert layer["relative_update"].value == pytest.approx(expected, rel=1e-5)
    assert any("compared whole" in note for note in found.provenance.parameters["notes"])


def test_a_start_inside_the_base_is_not_counted_twice(tmp_path: Path) -> None:
    base = live(llama(tmp_path / "base"))
    model = adapted(base, init_lora_weights="pissa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    # PEFT took the start out of the base, so W_res + B·A is far from W where B is zero
    found = geoscope.compare(base, model, kind="collapse")
    residual = model.get_base_model().state_dict()
    name = "model.layers.0.self_attn.q_proj"
    W = base.state_dict()[f"{name}.weight"].double()
    away = float((residual[f"{name}.base_layer.weight"].double() - W).norm() / W.norm())
    assert found.layers[name]["relative_update"].value == pytest.approx(away, rel=1e-6)
    with pytest.raises(OptionError, match="`initial_adapter`"):
        geoscope.compare(model.get_base_model(), model)


def test_what_is_saved_beside_the_factors_is_seen(tmp_path: Path) -> None:
    base = live(llama(tmp_path / "base"))
    model = adapted(base, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.01)
    quietly(lambda: model.save_pretrained(tmp_path / "adapter"))
    how: Any = {"include": "."}
    stored = geoscope.compare(tmp_path / "base", tmp_path / "adapter", **how)
    assert facts(geoscope.compare(base, model, **how)) == facts(stored)
    assert any(layer.name == "lm_head.weight" for layer in stored.layers)


def test_adapters_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    base = live(llama(tmp_path / "base"))
    model = adapted(base)
    with pytest.raises(OptionError, match=r"^`lora_alpha` 8: .* in memory"):
        geoscope.compare(base, model, lora_alpha=8.0)
    with pytest.raises(OptionError, match="a model and not an adapter"):
        geoscope.capacity(base)
    model.merge_adapter()
    with pytest.raises(OptionError, match=r"merged into the base; call unmerge_adapter\(\)"):
        geoscope.compare(base, model)


def test_a_series_of_adapters_in_memory(tmp_path: Path) -> None:
    base = live(llama(tmp_path / "base"))
    models = []
    for step in (1, 2, 3, 4):
        model = adapted(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(step)
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        models.append(model)
    stored = geoscope.follow(tmp_path / "run", base=tmp_path / "base")
    found = geoscope.follow(models, base=base, steps=(1, 2, 3, 4))
    assert found.layers == stored.layers and found.summary == stored.summary


class FullyShardedDataParallel(nn.Module):
    """By its name what FSDP makes: the state dict of it would wait for other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("waits for the other ranks")


def test_modules_that_are_sharded_are_refused_before_they_are_asked() -> None:
    with pytest.raises(UnsupportedFormat, match="flat shards of FSDP"):
        geoscope.compare({"inner.weight": torch.ones(4, 4)}, FullyShardedDataParallel())
