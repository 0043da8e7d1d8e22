"""What the pass over a series keeps of a weight equals dense algebra in fp64."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geoscope.errors import NonFiniteError
from geoscope.linalg import svd_leading
from geoscope.linalg.changes import side
from geoscope.linalg.series_leading import SeriesPass
from geoscope.verbs.series import memory, passes
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.passes import Kept, measured
from tests.helpers.matrices import gaussian, save_model, updated, with_spectrum

NAME, TURNED = "model.layers.0.mlp.up_proj.weight", "h.0.mlp.c_fc.weight"
STEPS = (0, 10, 20, 30, 40, 50)
SHAPES = {"tall": (500, 220), "wide": (220, 500), "square": (210, 210)}
STILL = 30  # nothing moved until there


def run(
    root: Path, shape: tuple[int, int], dtype: torch.dtype, *, turned: bool = False
) -> tuple[list[Tensor], Kept]:
    """Weights (out, in) at every step, and what is kept of them; `turned`: files hold (in, out)."""
    name, config = (TURNED, {"model_type": "gpt2"}) if turned else (NAME, None)
    now, weights, points = gaussian(*shape, seed=1), [], []
    for step in STEPS:
        if step not in (0, STILL):
            direction = with_spectrum(*shape, 0.5 ** torch.arange(6), seed=2)
            now = updated(now, direction + 2e-3 * gaussian(*shape, seed=step), 0.03)
        weights.append(now.to(dtype))
        stored = {name: weights[-1].T if turned else weights[-1]}
        points.append(str(save_model(root / f"checkpoint-{step}", stored, config=config)))
    options = FollowOptions(base=points[0])
    found = open_followed(points[1:], options)
    (tensor,) = found.tensors.values()
    assert tensor.shape == shape
    return weights, measured(tensor, found.steps, options)


@pytest.fixture(params=["searches", "spectra"])
def searched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Pairs by searches, as of large matrices, or by whole spectra."""
    found = request.param == "searches"
    monkeypatch.setattr(passes, "products_pay", lambda *_: found)
    monkeypatch.setattr(svd_leading, "leading_pays", lambda *_, **__: found)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("turned", [False, True], ids=["as_it_is", "turned"])
def test_everything_that_is_kept(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, searched: bool, turned: bool
) -> None:
    weights, kept = run(tmp_path, shape, dtype, turned=turned)
    wide = [one.double() for one in weights]
    updates, steps = [W - wide[0] for W in wide[1:]], [b - a for a, b in pairwise(wide)]
    flat = torch.stack(steps).flatten(1)
    inc, path, local = kept.increments, kept.path, kept.local
    assert path is not None and local is not None and kept.products is not None
    torch.testing.assert_close(inc.H, flat @ flat.T, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(inc.along, flat @ wide[0].flatten(), rtol=1e-11, atol=1e-12)
    assert inc.base_energy == pytest.approx(float(wide[0].square().sum()), rel=1e-12)
    assert inc.rounding == pytest.approx([side(one).noise ** 2 for one in weights])
    for found, dense in ((path, updates), (local, steps)):
        values = torch.stack([torch.linalg.svdvals(one)[:2] for one in dense])
        torch.testing.assert_close(found.sigma, values[:, 0], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(found.second, values[:, 1], rtol=1e-6, atol=1e-15)
        for u, one, v, value in zip(found.u, dense, found.v, values[:, 0], strict=True):
            assert float(u @ one @ v) == pytest.approx(float(value), rel=1e-9, abs=1e-15)
    for tau, update in enumerate(updates):
        known = slice(0, tau + 1)
        dense = path.u[known] @ update @ path.v[known].T
        ours = kept.products[tau, known, known]
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12 * float(update.norm()))
    assert kept.changed is not None
    counts = [int((b != a).sum()) for a, b in pairwise(weights)]
    assert list(kept.changed.changed) == counts
    assert counts[STEPS.index(STILL) - 1] == 0 < min(counts[:2])

    assert kept.method is not None
    for one in kept.method.values():
        assert one["how"].startswith("block-lanczos" if searched else "gram")
        assert one["fallback"] is None


@pytest.mark.usefixtures("searched")
def test_where_a_run_came_back_to_its_base(tmp_path: Path) -> None:
    """A zero update has no pair, and what others make of it stays zero."""
    weights = [gaussian(230, 210, seed=1)]
    for step in (1, 2):
        direction = with_spectrum(230, 210, 0.5 ** torch.arange(6), seed=step)
        weights.append(updated(weights[0], direction, 0.03))
    order = [weights[0], weights[1], weights[0], weights[2]]
    points = [
        str(save_model(tmp_path / f"checkpoint-{i}", {NAME: one.bfloat16()}))
        for i, one in enumerate(order)
    ]
    found = open_followed(points[1:], FollowOptions(base=points[0]))
    kept = measured(found.tensors[NAME], found.steps, FollowOptions(base=points[0]))
    assert kept.path is not None and kept.local is not None and kept.products is not None
    assert float(kept.path.sigma[1]) == 0 < float(kept.path.sigma[0])
    torch.testing.assert_close(kept.local.sigma[1], kept.path.sigma[0], rtol=1e-9, atol=0)
    last = order[3].bfloat16().double() - order[0].bfloat16().double()
    dense = kept.path.u @ last @ kept.path.v.T
    atol = 1e-12 * float(last.norm())
    torch.testing.assert_close(kept.products[2], dense, rtol=0, atol=atol)


def test_a_flat_spectrum_is_taken_whole_and_says_so(tmp_path: Path, searched: bool) -> None:
    weights = [gaussian(420, 300, seed=1)]
    for step in (1, 2):
        weights.append(
            weights[-1] + with_spectrum(420, 300, torch.linspace(1, 0.99, 300), seed=step)
        )
    points = [
        str(save_model(tmp_path / f"checkpoint-{i}", {NAME: one})) for i, one in enumerate(weights)
    ]
    found = open_followed(points[1:], FollowOptions(base=points[0]))
    kept = measured(found.tensors[NAME], found.steps, FollowOptions(base=points[0]))
    assert kept.path is not None and kept.products is not None and kept.method is not None
    assert ("flat" in str(kept.method["updates"]["fallback"])) == searched
    for i, (u, v) in enumerate(zip(kept.path.u, kept.path.v, strict=True)):
        update = weights[i + 1] - weights[0]
        assert float(kept.path.sigma[i]) == pytest.approx(
            float(torch.linalg.matrix_norm(update, 2))
        )
        assert float(kept.products[i, i, i]) == pytest.approx(float(u @ update @ v), rel=1e-12)


def test_a_search_that_fails_says_so_and_the_answer_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched: bool
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no convergence")

    monkeypatch.setattr("geoscope.linalg.leading._krylov", broken)
    weights, kept = run(tmp_path, SHAPES["wide"], torch.bfloat16)
    assert kept.path is not None and kept.products is not None and kept.method is not None
    wide = [one.double() for one in weights]
    for i, one in enumerate(wide[1:]):
        values = torch.linalg.svdvals(one - wide[0])
        torch.testing.assert_close(kept.path.sigma[i], values[0], rtol=1e-10, atol=0)
        dense = kept.path.u[: i + 1] @ (one - wide[0]) @ kept.path.v[: i + 1].T
        ours = kept.products[i, : i + 1, : i + 1]
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12 * float(values[0]))
    reason = "block Lanczos failed: no convergence" if searched else None
    assert kept.method["updates"]["fallback"] == reason


def test_a_checkpoint_with_nan_is_named_by_its_step(tmp_path: Path, searched: bool) -> None:
    weights = [gaussian(230, 210, seed=1).bfloat16() for _ in range(3)]
    weights[1][7, 5] = float("nan")
    points = [
        str(save_model(tmp_path / f"checkpoint-{10 * i}", {NAME: one}))
        for i, one in enumerate(weights)
    ]
    found = open_followed(points[1:], FollowOptions(base=points[0]))
    with pytest.raises(NonFiniteError, match="step 10 holds NaN or infinity"):
        measured(found.tensors[NAME], found.steps, FollowOptions(base=points[0]))


def test_memory_that_is_promised_covers_what_certifies_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays of the pass, which grow with the cube of the steps."""
    monkeypatch.setattr(passes, "products_pay", lambda *_: True)
    monkeypatch.setattr(memory, "_BLOCKS", 0)
    held: list[int] = []

    class Counted(SeriesPass):
        def leading(self, k: int, *, certified: int) -> Any:
            near = (*chain(*self._there), *chain(*self._back), *self._pairs)
            held.append(sum(one.nbytes for one in near))
            return super().leading(k, certified=certified)

    monkeypatch.setattr(passes, "SeriesPass", Counted)
    weights, points = [gaussian(64, 48, seed=1)], []
    for step in range(41):
        points.append(str(save_model(tmp_path / f"checkpoint-{step}", {NAME: weights[-1]})))
        direction = with_spectrum(64, 48, 0.5 ** torch.arange(6), seed=2)
        weights.append(updated(weights[-1], direction, 0.02))
    found = open_followed(points[1:], FollowOptions(base=points[0]))
    tensor = found.tensors[NAME]
    measured(tensor, found.steps, FollowOptions(base=points[0]))
    stored = 3 * weights[0].nbytes + 8 * weights[0].numel()
    assert held[0] > stored
    assert held[0] <= memory.working_bytes(tensor) - stored <= 1.2 * held[0]
