"""Tensors and modules in place of files: the same report, and nothing of the caller's touched."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geoscope
from geoscope.errors import OptionError, PairingError, UnsupportedFormat
from tests.helpers.matrices import gaussian, save_model
from tests.helpers.running import weights


def facts(report: geoscope.Report) -> str:
    """The report but for its provenance, as bytes are compared."""
    found = report.to_json()
    del found["provenance"]
    return json.dumps(found, sort_keys=True)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: one.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, one in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["compare", "capacity"])
def test_state_dicts_give_the_report_of_their_files(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    before = {name: one.to(dtype) for name, one in weights().items()}
    after = {name: one.to(dtype) for name, one in weights(100).items()}
    kept = bits(before), bits(after)
    files = [save_model(tmp_path / n, w) for n, w in (("base", before), ("tuned", after))]
    assert facts(geoscope.compare(before, after, kind=kind)) == facts(
        geoscope.compare(*files, kind=kind)
    )
    assert (bits(before), bits(after)) == kept
    assert facts(geoscope.compare(files[0], after, kind=kind)) == facts(
        geoscope.compare(before, files[1], kind=kind)
    )


def test_several_models_are_compared_in_memory_as_on_disk(tmp_path: Path) -> None:
    states = [weights(), weights(100), weights(200)]
    files = [save_model(tmp_path / f"model-{i}", state) for i, state in enumerate(states)]
    live, stored = geoscope.compare(*states, anchor=states[2]), geoscope.compare(*files)
    assert live.layers == stored.layers and live.overlaps == stored.overlaps
    assert [ref.given for ref in live.provenance.refs] == [
        "base (state dict)", "tuned 1 (state dict)", "tuned 2 (state dict)",
    ]  # fmt: skip
    assert live.summary.anchor is not None
    assert live.summary.anchor["ref"]["given"] == "anchor (state dict)"
    with pytest.raises(KeyError, match="2 tuned models"):
        live.layers[live.layers[0].name]


def test_nothing_of_the_caller_lives_on() -> None:
    before, after = weights(), weights(100)
    watched = [weakref.ref(one) for one in (*before.values(), *after.values())]
    report = geoscope.compare(before, after, kind="collapse")
    del before, after
    gc.collect()
    assert [one for one in watched if one() is not None] == []
    assert len(report.layers) == 4


def test_strided_views_and_parameters_are_read_as_they_stand() -> None:
    before, after = weights(), weights(100)
    plain = geoscope.compare(before, after, kind="collapse")
    turned = {
        name: nn.Parameter(one.T.contiguous().T) if one.dim() == 2 else one
        for name, one in after.items()
    }
    assert facts(geoscope.compare(before, turned, kind="collapse")) == facts(plain)


def test_an_open_checkpoint_is_a_model(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", weights())
    tuned = save_model(tmp_path / "tuned", weights(100))
    opened = [geoscope.open_checkpoint(str(path)) for path in (base, tuned)]
    assert facts(geoscope.compare(*opened)) == facts(geoscope.compare(base, tuned))


def test_every_command_has_its_function() -> None:
    before, after = weights(), weights(100)
    for name in ("collapse", "alignment", "anisotropy", "capacity", "compare"):
        report = getattr(geoscope, name)(before, after, include="q_proj")
        assert report.kind == name and len(report.layers) == 2
    survey = geoscope.inspect(before, after)
    assert len(survey.pairing.matrices) == 4
    assert [one["given"] for one in geoscope.inspect(before).models] == ["model (state dict)"]


def test_options_are_named_in_the_call() -> None:
    before, after = weights(), weights(100)
    options = geoscope.Options(ks=(2, 4), seed=3)
    both = geoscope.compare(before, after, options=options, seed=5)
    assert both.provenance.seed == 5 and list(both.provenance.parameters["ks"]) == [2, 4]
    with pytest.raises(OptionError, match="'k' is not an option of this function; is ks meant"):
        geoscope.compare(before, after, k=(2,))
    with pytest.raises(OptionError, match="'nonsense' is not an option"):
        geoscope.follow([before, after], nonsense=1)


def test_a_series_in_memory_is_that_of_the_files(tmp_path: Path) -> None:
    base, tuned = weights(), weights(100)
    states = [{n: base[n] + i / 4 * (tuned[n] - base[n]) for n in base} for i in range(1, 5)]
    for i, state in enumerate(states, start=1):
        save_model(tmp_path / "run" / f"checkpoint-{i}", state)
    stored = geoscope.follow(tmp_path / "run", base=save_model(tmp_path / "base", base))
    live = geoscope.follow(states[::-1], base=base, steps=(4, 3, 2, 1))
    assert live.layers == stored.layers and live.summary == stored.summary
    with pytest.raises(OptionError, match=r"^`steps`: one number for each of the 4 models"):
        geoscope.follow(states, base=base)
    with pytest.raises(OptionError, match="step 1 is there twice"):
        geoscope.follow(states[:2], base=base, steps=(1, 1))
    with pytest.raises(OptionError, match="not both; open the paths first"):
        geoscope.follow([states[0], "run"], steps=(1, 2))


# --- one pair of matrices -----------------------------------------------------------------------


def test_a_pair_of_matrices_has_the_numbers_of_its_svd() -> None:
    W, G = gaussian(24, 40, seed=1), gaussian(24, 40, seed=2, sd=1e-3)
    found = geoscope.measure(W, W + G)
    update = torch.linalg.svdvals(W + G - W)
    assert found["stable_rank"].value == pytest.approx(
        float(update.square().sum() / update[0] ** 2), rel=1e-9
    )
    ratio = float((W + G - W).norm() / W.norm())
    assert found["relative_update"].value == pytest.approx(ratio, rel=1e-12)
    assert found["update.stable_rank"].null is not None
    assert found["stable_rank"].status is geoscope.Status.OK
    same = geoscope.measure(W, W)
    assert same["update.stable_rank"] == (None, found["update.stable_rank"].null, "ZERO_UPDATE")
    for wrong in (W[0], W[:1], 3.0, W.numpy()):
        with pytest.raises(OptionError, match="a matrix of two rows and columns"):
            geoscope.measure(W, wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="different shapes"):
        geoscope.measure(W, W.T)


# --- what is refused ----------------------------------------------------------------------------


class Sharded:
    """What marks the tensors of frameworks that keep a part on each rank."""


def marked(name: str) -> Tensor:
    tensor = torch.ones(4, 4)
    setattr(tensor, name, lambda: None)
    return tensor


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (dict, OptionError, "no tensors"),
        (lambda: {"model": weights()}, OptionError, "'model' holds dict and no tensor"),
        (lambda: {"a": 3}, OptionError, "'a' holds int"),
        (lambda: {3: torch.ones(2, 2)}, OptionError, "state_dict"),
        (lambda: {"a": torch.ones(4, 4, device="meta")}, UnsupportedFormat, "meta device"),
        (lambda: {"a": torch.ones(4, 4).to_sparse()}, UnsupportedFormat, "dense"),
        (lambda: {"a": marked("full_tensor")}, UnsupportedFormat, "get_model_state_dict"),
        (lambda: {"a": marked("ds_id")}, UnsupportedFormat, "GatheredParameters"),
    ],
)
def test_what_is_no_whole_model_is_refused_with_the_way_out(
    make: Callable[[], Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        geoscope.compare(weights(), make())
    assert str(caught.value).startswith("tuned (state dict): ")
    assert "\n" not in str(caught.value)


def test_models_without_a_common_name_do_not_pair() -> None:
    with pytest.raises(PairingError):
        geoscope.compare(weights(), {"x.weight": torch.ones(3, 3)})


def test_a_dtensor_is_refused(tmp_path: Path) -> None:
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        live = {name: distribute_tensor(one, mesh) for name, one in weights(100).items()}
        with pytest.raises(UnsupportedFormat, match=r"DTensor.*full_state_dict=True"):
            geoscope.compare(weights(), live)
    finally:
        dist.destroy_process_group()
