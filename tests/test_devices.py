"""Whole comparisons by the route of devices agree with those of the CPU.

Here that route runs on CPU tensors, stacks and all; the tests marked `gpu` run it on CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from geoscope import Options, Report, capacity, compare, extrapolate, init_adapter, open_adapter
from geoscope.engine import plan
from geoscope.linalg import Factors, Operand, choice, stacked, svd_leading
from geoscope.linalg import svd as svd_module
from tests.helpers.matrices import gaussian, orthonormal, save_model, updated

SHAPES = {"self_attn.q_proj": (300, 300), "mlp.up_proj": (640, 280), "mlp.down_proj": (280, 640)}
LAYERS = 2
ROUTES = {
    "whole": Options(ks=(4, 16), masks=True, curves=True),
    "quick": Options(ks=(4, 16), quick=True),
}
every_route = pytest.mark.parametrize("options", ROUTES.values(), ids=ROUTES)


def weight(m: int, n: int, *, seed: int) -> Tensor:
    """A bulk, and outliers that decay to it: more than any subspace that is taken."""
    scale = 4 * 0.94 ** torch.arange(64, dtype=torch.float64)
    U, V = orthonormal(m, 64, seed=seed), orthonormal(n, 64, seed=seed + 1)
    return gaussian(m, n, seed=seed + 2, sd=1e-3) + (U * scale) @ V.T


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, tuned = {}, {}
    for layer in range(LAYERS):
        for number, (kind, (m, n)) in enumerate(SHAPES.items()):
            name, seed = f"model.layers.{layer}.{kind}.weight", 100 * layer + 10 * number
            before = weight(m, n, seed=seed)
            low = gaussian(m, 4, seed=seed + 5) @ gaussian(4, n, seed=seed + 6)
            direction = low / low.norm() + gaussian(m, n, seed=seed + 7, sd=0.5 / (m * n) ** 0.5)
            base[name] = before.bfloat16()
            tuned[name] = updated(before, direction, 0.02).bfloat16()
    folder = tmp_path_factory.mktemp("models")
    return save_model(folder / "base", base), save_model(folder / "tuned", tuned)


@pytest.fixture
def _by_the_route_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go where tensors of a device go, in stacks."""

    def factorise(A: Operand, *, vectors: int = 0, cuts: Sequence[int] = (), **_: Any) -> Factors:
        return svd_module._factorise_stacked(A, vectors, cuts)

    leading = svd_leading._leading

    def as_stack(*given: Any, **_: Any) -> Factors:
        return leading(*given, as_stack=True)

    def in_stacks(*given: Any, **options: Any) -> Any:
        return plan(*given, **{**options, "stack": True, "memory": 10**11})

    for name in ("gram", "norm"):
        product = getattr(stacked, name)
        monkeypatch.setattr(Operand, name, lambda A, f=product: f(A.plus, A.minus))
    for name in ("left", "right"):
        product = getattr(stacked, name)
        monkeypatch.setattr(Operand, name, lambda A, X, f=product: f(A.plus, A.minus, X))
    monkeypatch.setattr(Operand, "both", lambda A, X, Y: (A.right(X), A.left(Y)))
    for module in ("geoscope.linalg.svd_leading", "geoscope.metrics.providers"):
        monkeypatch.setattr(sys.modules[module], "factorise", factorise)
    monkeypatch.setattr(svd_leading, "_leading", as_stack)
    monkeypatch.setattr(sys.modules["geoscope.verbs.pairs.prepare"], "plan", in_stacks)


def report(models: tuple[Path, Path], options: Options, device: str) -> Report:
    return compare(*models, options=options.__class__(**{**vars(options), "device": device}))


def assert_agree(ours: Report, theirs: Report, *, quick: bool) -> None:
    """1e-7 relative, angles to 2e-8 rad; with `quick` vectors are those of an fp32 space."""
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.name == b.name
        assert a.status == b.status
        assert a.values.keys() == b.values.keys()
        for key, value in a.values.items():
            other = b.values[key]
            angle = key.startswith(("angle", "intruder"))
            rel, absolute = (1e-4, 1e-4) if quick else (1e-7, 2e-8 if angle else 1e-9)
            if value is None or other is None:
                assert value is other, (a.name, key)
            else:
                assert value == pytest.approx(other, rel=rel, abs=absolute), (a.name, key)


def hows(found: Report) -> set[str]:
    return {how["how"].split("-")[0] for one in found.layers for how in one.method.values()}


@every_route
def test_the_route_of_devices_gives_the_report_of_the_cpu(
    models: tuple[Path, Path],
    options: Options,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "_STACKED_FROM", 64)  # these matrices are small
    monkeypatch.setattr(choice, "_STACKED_PART", 0.3)
    monkeypatch.setattr(
        svd_leading, "leading_pays", lambda shape, k, **_: choice.leading_pays_stacked(shape, k)
    )
    expected = report(models, options, "cpu")
    request.getfixturevalue("_by_the_route_of_devices")
    found = report(models, options, "cpu")
    assert ("block" if options.quick else "gram") in hows(found)
    assert_agree(found, expected, quick=options.quick)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_route
@pytest.mark.parametrize("memory", [None, "0"], ids=["stacks", "one_by_one"])
def test_cuda_gives_the_report_of_the_cpu(
    models: tuple[Path, Path], options: Options, memory: str | None
) -> None:
    there = options.__class__(**{**vars(options), "max_memory": memory})
    assert_agree(report(models, there, "cuda"), report(models, options, "cpu"), quick=options.quick)


@pytest.fixture(scope="module")
def in_memory() -> tuple[dict[str, Tensor], ...]:
    """Base and tuned model with a small matrix and one that is not."""
    base, tuned = {}, {}
    for seed, (m, n) in enumerate(((120, 110), (64, 80))):
        name = f"model.layers.{seed}.self_attn.q_proj.weight"
        before = weight(m, n, seed=300 + 10 * seed)
        base[name] = before.bfloat16()
        tuned[name] = updated(before, gaussian(m, n, seed=seed), 0.02).bfloat16()
    return base, tuned


@pytest.fixture(scope="module")
def adapter(in_memory: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    made = {}
    for seed, (name, weight) in enumerate(in_memory[0].items()):
        m, n = weight.shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        made[f"{stem}.lora_A.weight"] = gaussian(8, n, seed=seed).float()
        made[f"{stem}.lora_B.weight"] = gaussian(m, 8, seed=seed + 50, sd=1e-3).float()
    return made


CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
on_cuda = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)


def moved(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@on_cuda
def test_models_that_lie_on_a_device(in_memory: tuple[dict[str, Tensor], ...], device: str) -> None:
    expected = compare(*in_memory, options=replace(ROUTES["whole"], device="cpu"))
    there = [moved(one, device) for one in in_memory]
    for options in (ROUTES["whole"], replace(ROUTES["whole"], device="cpu")):
        assert_agree(compare(*there, options=options), expected, quick=False)


@on_cuda
def test_adapters_on_a_device(
    in_memory: tuple[dict[str, Tensor], ...], adapter: dict[str, Tensor], device: str
) -> None:
    here = open_adapter(adapter, CONFIG)
    there = open_adapter(moved(adapter, device), CONFIG)
    one = compare(in_memory[0], here, ks=(4, 8), device="cpu")
    other = compare(moved(in_memory[0], device), there, ks=(4, 8), device=device)
    assert_agree(other, one, quick=False)
    assert_agree(capacity(there, device=device), capacity(here, device="cpu"), quick=False)


@on_cuda
def test_several_tuned_models_on_a_device(
    in_memory: tuple[dict[str, Tensor], ...], device: str
) -> None:
    base, tuned = in_memory
    other = {name: weight.roll(1, 0) for name, weight in tuned.items()}
    one = compare(base, tuned, other, ks=(4, 16), device="cpu")
    two = compare(
        *(moved(each, device) for each in (base, tuned, other)), ks=(4, 16), device=device
    )
    assert_agree(two, one, quick=False)
    for mine, theirs in zip(two.overlaps, one.overlaps, strict=True):
        for key, value in mine.values.items():
            assert value == pytest.approx(theirs.values[key], rel=1e-7, abs=1e-9)


@on_cuda
@pytest.mark.parametrize("method", ["geora", "pissa", "rlpo"])
def test_initial_adapters_on_a_device(
    in_memory: tuple[dict[str, Tensor], ...], method: str, device: str
) -> None:
    here = init_adapter(in_memory[0], method=method, rank=8, device="cpu")
    there = init_adapter(moved(in_memory[0], device), method=method, rank=8, device=device)
    for name, A in here.tensors.items():
        if ".lora_A." in name:
            partner = name.replace(".lora_A.", ".lora_B.")
            expected = here.tensors[partner].double() @ A.double()
            found = there.tensors[partner].double() @ there.tensors[name].double()
            assert (found.cpu() - expected).norm() <= 1e-5 * expected.norm()


@on_cuda
def test_networks_train_on_a_device(tmp_path: Path, device: str) -> None:
    series = []
    for step in range(6):
        weights = {
            f"model.layers.{i}.self_attn.q_proj.weight": gaussian(24, 24, seed=i)
            + 0.01 * step * gaussian(24, 2, seed=i + 9, sd=1.0) @ gaussian(2, 24, seed=i + 5)
            for i in range(2)
        }
        series.append(save_model(tmp_path / f"checkpoint-{10 * step}", weights))
    how = {"method": "next", "training": 20, "force": True}
    here = extrapolate(series, 60, **how)
    there = extrapolate(series, 60, device=device, **how)
    for name, expected in here.tensors.items():
        last = load_file(series[-1] / "model.safetensors")[name].double()
        moves = (expected.double() - last).norm()
        assert (there.tensors[name].cpu().double() - expected.double()).norm() <= 0.05 * moves
