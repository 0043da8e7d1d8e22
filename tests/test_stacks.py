"""Small matrices are computed in stacks: what is told of one depends on none of the others."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import geoscope
from geoscope.engine import one_blas_thread
from geoscope.linalg.changes import nonfinite_counts, nonfinite_entries, unchanged, unchanged_shares
from geoscope.linalg.grids import grid_of, grids_of
from geoscope.linalg.perturbed import mean_angles, tuned_spectra
from geoscope.verbs.options import Options
from tests.helpers.matrices import DTYPES, gaussian, heavy_headed, save_model
from tests.helpers.running import by_rows

planning = importlib.import_module("geoscope.engine.plan")  # its name is that of a function, too

SHAPES = {"gate_proj": (96, 64), "down_proj": (64, 96), "up_proj": (48, 48)}
EXPERTS = 7


def weights(dtype: torch.dtype, *, tuned: bool) -> dict[str, Tensor]:
    """Experts of which one does not move, one holds NaN, one lies on a grid, one is very small."""
    tensors = {}
    for i, (module, (m, n)) in enumerate(SHAPES.items()):
        for expert in range(EXPERTS):
            W = heavy_headed(m, n, seed=100 * i + 2 * expert)
            if tuned and expert != 1:
                W = W + gaussian(m, n, seed=100 * i + expert + 50, sd=4e-4 * 3.0**-expert)
            if expert == 2 and tuned:
                W[3, 4] = torch.nan
            if expert == 3:
                W = (W / 0.01).round() * 0.01
            if expert == 4:
                W = W * 1e-9
            tensors[f"model.layers.0.mlp.experts.{expert}.{module}.weight"] = W.to(dtype)
    return tensors


def told(folder: Path, jobs: int, **options: Any) -> list[str]:
    """The part of the report that each matrix has, and the verdict."""
    chosen = Options(jobs=jobs, ks=(4, 16), cache=None, **options)
    report = geoscope.compare(str(folder / "base"), str(folder / "tuned"), options=chosen)
    found = by_rows(report.to_json())
    return [json.dumps(part) for part in (*found["layers"], found["summary"])]


@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp16", "fp32"))]
)
def test_reports_do_not_depend_on_stacks_and_workers(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("base", "tuned"):
        save_model(tmp_path / side, weights(DTYPES[dtype], tuned=side == "tuned"))
    runs = []
    for together, turns, jobs in ((0, 1, 1), (10**9, 1, 1), (10**9, 1, 2), (10**6, 4, 2)):
        monkeypatch.setattr(planning, "_MAX_STACK_BYTES", together)
        monkeypatch.setattr(planning, "_STACKS_PER_WORKER", turns)
        runs.append(told(tmp_path, jobs))
    assert len(runs[0]) == len(SHAPES) * EXPERTS + 1
    assert runs[1:] == [runs[0]] * 3
    failed = [part for part in runs[0][:-1] if "NON_FINITE" in part]
    assert len(failed) == len(SHAPES)


@pytest.mark.parametrize("options", [{"masks": True, "curves": True}, {"quick": True}])
def test_nor_do_those_with_other_options(
    options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("base", "tuned"):
        save_model(tmp_path / side, weights(torch.bfloat16, tuned=side == "tuned"))
    stacked = told(tmp_path, 2, **options)
    monkeypatch.setattr(planning, "_MAX_STACK_BYTES", 0)
    assert told(tmp_path, 1, **options) == stacked


SPECTRA = torch.stack(
    [
        torch.linspace(3, 1, 40, dtype=torch.float64),
        torch.cat([torch.full((20,), 2.0), torch.full((20,), 1.0)]).double(),  # repeated
        torch.cat([torch.linspace(3, 1, 12), torch.zeros(28)]).double(),  # of low rank
        torch.linspace(1e-3, 1e-4, 40, dtype=torch.float64),
        torch.zeros(40, dtype=torch.float64),
    ]
)
SPREADS = torch.tensor([0.5, 0.01, 0.3, 0.2, 0.1], dtype=torch.float64)


def test_sampled_spectra_of_a_stack_are_those_of_each() -> None:
    shape, seed = (40, 60), 3
    with one_blas_thread():
        found = tuned_spectra(SPECTRA, SPREADS, shape=shape, seed=seed)
        for i, (S, spread) in enumerate(zip(SPECTRA, SPREADS, strict=True)):
            assert torch.equal(found[i], tuned_spectra(S, float(spread), shape=shape, seed=seed))


@pytest.mark.parametrize("k", [1, 8, 40])
def test_sampled_angles_of_a_stack_are_those_of_each(k: int) -> None:
    spectra, spreads = SPECTRA[:4], torch.cat([SPREADS[:3], torch.zeros(1)]).double()
    with one_blas_thread():
        both = mean_angles(spectra, spreads, k=k, shape=(40, 60), seed=1)
        for i, (S, spread) in enumerate(zip(spectra, spreads, strict=True)):
            alone = mean_angles(S, float(spread), k=k, shape=(40, 60), seed=1)
            for stacked, own in zip(both, alone, strict=True):
                assert torch.equal(stacked[i], own[0])
    assert not both[0][3].any()  # nothing is added to the last


def test_the_leading_subspace_that_is_the_whole_space_does_not_turn() -> None:
    left, right = mean_angles(SPECTRA[:1], 0.1, k=40, shape=(40, 60), seed=0)
    assert not left.any()
    assert right.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_of_a_stack_are_counted_as_those_of_each(dtype: str) -> None:
    names = [name for name in weights(DTYPES[dtype], tuned=False) if "gate" in name]
    base, tuned = (
        torch.stack([weights(DTYPES[dtype], tuned=moved)[name] for name in names])
        for moved in (False, True)
    )
    assert nonfinite_counts(tuned) == [nonfinite_entries(one) for one in tuned]
    assert nonfinite_counts(tuned)[2] == 1
    whole = [i for i in range(len(base)) if i != 2]
    pairs = zip(base[whole], tuned[whole], strict=True)
    assert unchanged_shares(base[whole], tuned[whole]) == [unchanged(*pair) for pair in pairs]
    assert grids_of(base) == tuple(grid_of(one) for one in base)
    assert [grid is not None for grid in grids_of(base)] == [i == 3 for i in range(len(base))]
