"""init, verify and convert on models and adapters of this process: as on their saved files."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import geoscope
from geoscope.errors import CheckpointError, OptionError, UnsupportedFormat
from tests.helpers.tiny_models import live, llama
from tests.helpers.trained import adapted, initialised, peft, saved, train

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about themselves
LAYOUTS = [("lora", None), ("pissa", "residual"), ("pissa", "mirror"), ("geora", "anchor")]


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: one for file in files for name, one in load_file(file).items()}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state_of(model: Any) -> dict[str, Tensor]:
    """The active adapter, as PEFT saves it; in memory of its own."""
    return {name: one.clone() for name, one in peft.get_peft_model_state_dict(model).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which stays empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


# --- a start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "layout"), LAYOUTS)
def test_a_start_in_memory_is_the_written_one(
    base: Path, tmp_path: Path, empty: Path, method: str, layout: str | None
) -> None:
    how = {"method": method, "rank": 2, "layout": layout}
    out = tmp_path / "out"
    written = geoscope.init_adapter(base, out, **how)
    assert written.tensors == written.residual == {} and written.readme is not None
    inside = out / "adapter" if layout in ("residual", "anchor") else out
    models = live(base), weights(base), geoscope.open_checkpoint(str(base))
    for model in models if layout == "residual" else models[:1]:
        made = geoscope.init_adapter(model, **how)
        assert same(made.tensors, weights(inside)) and (made.out, made.readme) == (None, None)
        assert same(made.residual, weights(out / "residual"))
        assert same(made.anchor, weights(out / "anchor"))
        names = [dict(one.config).pop("base_model_name_or_path") for one in (made, written)]
        assert names[1] == str(out / "residual" if layout == "residual" else base)
        assert names[0] in (None, names[1])
        differing = {"base_model_name_or_path": None}
        assert {**made.config, **differing} == {**written.config, **differing}
        assert made.report.layers == written.report.layers
        assert made.report.provenance.argv == ()
        found = geoscope.verify_adapter(made, base=model)
        assert found.ok and found.layout == layout
        ids = [check.id for check in geoscope.verify_adapter(written, base=base).checks]
        assert [check.id for check in found.checks] == ids


def test_a_start_of_a_module_is_loaded_by_peft(base: Path, tmp_path: Path) -> None:
    model = live(base)
    out = tmp_path / "out"
    made = geoscope.init_adapter(model, out, method="pissa", rank=2)
    assert geoscope.verify_adapter(made, base=base, with_peft=True).ok
    assert any("put its tokenizer beside it" in note for note in made.card.notes)
    assert {path.name for path in (out / "residual").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip


def test_a_check_in_memory_can_fail(base: Path) -> None:
    made = geoscope.init_adapter(base, method="pissa", rank=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert isinstance(made.residual, dict)
    made.residual[name] += 1e-3
    failed = {check.id for check in geoscope.verify_adapter(made, base=base).checks if not check.ok}
    assert failed == {"weights"}


def test_nothing_of_the_caller_lives_on(base: Path) -> None:
    state = weights(base)
    before = {name: one.clone() for name, one in state.items()}
    watched = [weakref.ref(one) for one in state.values()]
    made = geoscope.init_adapter(state, method="pissa", rank=2)
    assert same(state, before)
    kept = {
        one.untyped_storage().data_ptr()
        for one in (*made.tensors.values(), *made.residual.values())
    }
    assert not kept & {one.untyped_storage().data_ptr() for one in state.values()}
    del state
    gc.collect()
    assert [one for one in watched if one() is not None] == []


# --- a conversion -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any, Any]:
    """A start that is not zero and what training made of it: folders, the start, the model."""
    folder = tmp_path_factory.mktemp("run")
    model = initialised(adapted(base))
    start = geoscope.open_adapter(state_of(model), model.peft_config["default"])
    first = saved(model, folder / "start")
    return first, saved(train(model), folder / "trained"), start, model


def facts(report: geoscope.Report) -> str:
    found = report.to_json()
    del found["provenance"]
    return json.dumps(found, sort_keys=True)


@pytest.mark.parametrize("rank", [None, 5])
def test_a_conversion_in_memory_is_the_written_one(
    base: Path, tmp_path: Path, empty: Path, run: tuple[Path, Path, Any, Any], rank: int | None
) -> None:
    first, trained, start, model = run
    out = tmp_path / "out"
    written = geoscope.convert_adapter(first, trained, out, base=base, rank=rank)
    state = geoscope.open_adapter(state_of(model), model.peft_config["default"])
    for initial, end, original in (
        (start, model, base), (start, state, live(base)), (first, state, weights(base)),
    ):  # fmt: skip
        made = geoscope.convert_adapter(initial, end, base=original, rank=rank)
        assert same(made.tensors, weights(out))
        assert (made.modules, made.discarded) == (written.modules, written.discarded)
        differing = {"base_model_name_or_path": None}
        assert {**made.config, **differing} == {**written.config, **differing}
    found = geoscope.verify_adapter(made.adapter, base=weights(base))
    assert found.ok and found.folder == "adapter (state dict)"
    plain = geoscope.anisotropy(base, made.adapter, include="q_proj")
    assert facts(plain) == facts(geoscope.anisotropy(base, out, include="q_proj"))


def test_a_start_in_memory_is_taken_off(base: Path, run: tuple[Path, Path, Any, Any]) -> None:
    first, trained, start, model = run
    how: Any = {"include": "q_proj"}
    stored = facts(geoscope.anisotropy(base, trained, initial_adapter=first, **how))
    state = geoscope.open_adapter(state_of(model), model.peft_config["default"])
    for tuned, initial in ((model, start), (state, start), (trained, start), (state, first)):
        found = geoscope.anisotropy(base, tuned, initial_adapter=initial, **how)
        assert facts(found) == stored
        name = str(first) if initial is first else "adapter (state dict)"
        assert found.provenance.parameters["initial_adapter"] == name
    assert facts(geoscope.anisotropy(base, model, **how)) != stored  # so that the test can fail
    alone = geoscope.capacity(trained, initial_adapter=first, **how)
    assert facts(geoscope.capacity(state, initial_adapter=start, **how)) == facts(alone)


def test_the_configuration_may_be_a_table_or_of_peft(run: tuple[Path, Path, Any, Any]) -> None:
    first, _, start, _ = run
    table = json.loads((first / "adapter_config.json").read_text(encoding="utf-8"))
    found = geoscope.open_adapter(weights(first), table)
    assert found.modules == start.modules
    assert repr(found) == "<geoscope.Adapter adapter (state dict): LORA, 14 modules>"
    assert geoscope.open_adapter(found) is found
    doubled = geoscope.open_adapter(weights(first), table, alpha=2 * table["lora_alpha"])
    name = next(iter(found.modules))
    assert doubled.modules[name].scaling == 2 * found.modules[name].scaling
    with pytest.raises(OptionError, match=r"the configuration of adapter .* is in memory"):
        geoscope.open_adapter(found, alpha=8.0)


def test_an_adapter_on_a_rewritten_base_says_so_in_memory(base: Path, tmp_path: Path) -> None:
    geoscope.init_adapter(base, tmp_path / "out", method="pissa", rank=2)
    folder = tmp_path / "out" / "adapter"
    table = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = geoscope.open_adapter(weights(folder), table)
    assert state.initial == f"its base {tmp_path / 'out' / 'residual'} is a rewritten one"
    for start in (None, state):  # the one beside the rewritten base is found
        found = geoscope.anisotropy(base, state, initial_adapter=start, include="q_proj")
        assert found.layers[0]["relative_update"].value == 0


# --- what is refused ----------------------------------------------------------------------------


def test_what_is_no_adapter_is_refused_by_name(
    base: Path, run: tuple[Path, Path, Any, Any]
) -> None:
    _, trained, start, model = run
    state, whole = state_of(model), live(base)
    loose: Any = geoscope
    calls: list[tuple[str, Callable[[], Any]]] = [
        (
            "^`initial_adapter`: an adapter",
            lambda: loose.compare(base, model, initial_adapter=state),
        ),
        (
            "^`initial_adapter`: an adapter",
            lambda: loose.compare(base, model, initial_adapter=whole),
        ),
        ("^`initial`: a state dict", lambda: loose.convert_adapter(state, model)),
        ("^`trained` .*a model and not", lambda: loose.convert_adapter(start, whole)),
        ("^`folder`: a state dict", lambda: loose.verify_adapter(state)),
        ("^`folder` .*a model and not", lambda: loose.verify_adapter(whole)),
        ("^`base`: the original model", lambda: loose.verify_adapter(trained, base=model)),
        ("^`with_peft` loads folders", lambda: loose.verify_adapter(model, with_peft=True)),
        ("^config NoneType", lambda: loose.open_adapter(state)),
        (
            "^options: InitOptions is needed, not Options",
            lambda: loose.init_adapter(base, options=geoscope.Options()),
        ),
        ("^`rank` 'a'", lambda: loose.init_adapter(base, rank="a")),
        ("^`rank` 'a'", lambda: loose.convert_adapter(start, model, rank="a")),
        ("'ranks' is not an option.*rank meant", lambda: loose.init_adapter(base, ranks=2)),
    ]
    for text, call in calls:
        with pytest.raises(OptionError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    for model_with in (model, start):
        with pytest.raises(CheckpointError, match="has an adapter, but init-adapter needs a whole"):
            geoscope.init_adapter(model_with)


def test_weights_that_are_elsewhere_are_refused_with_the_way_out(base: Path) -> None:
    state = weights(base)
    gone = {name: one.to("meta") for name, one in state.items()}
    for call in (
        lambda: geoscope.init_adapter(gone),
        lambda: geoscope.lineage(gone, base),
        lambda: geoscope.inspect(gone),
        lambda: geoscope.extrapolate([gone, gone], 5, steps=(1, 2)),
    ):
        with pytest.raises(UnsupportedFormat, match="load the model whole"):
            call()
