"""Between checkpoints and along the depth: against the pairs, and in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geoscope.records import Report, Status
from geoscope.verbs.pairs.compare import compare, measure_adapter
from geoscope.verbs.series.between import CHANGES, changes_between
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.ranks import RANKS, is_of
from tests.helpers.runs import LLAMA, Run, lora_run

STEPS = (0, 10, 20, 40)
SHARES = "depth_share@"


def followed(run: Run, **options: object) -> Report:
    given = {"base": str(run.base), "jobs": 1, "directions": False, **options}
    return follow([run.folder], options=FollowOptions(**given))  # pyright: ignore[reportArgumentType]


def run_of(root: Path, scales: Sequence[float], dtype: torch.dtype = torch.float64) -> Run:
    """Every matrix of block b moves by scales[b]·t in every entry."""
    models = [
        {
            name: torch.full(shape, 1.0 + t * scales["layers.1" in name], dtype=dtype)
            for name, shape in LLAMA.items()
        }
        for t in STEPS
    ]
    return Run.of(root, STEPS, models)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("between")
    return Run.write(root, STEPS, dtype=torch.bfloat16, rho=2e-4)


def test_shares_and_nulls_are_those_of_compare_on_neighbours(run: Run) -> None:
    found = followed(run)
    for i, (before, after) in enumerate(zip((run.base, *run.points), run.points, strict=False)):
        pair = compare(str(before), str(after), kind="anisotropy", device="cpu")
        rows: list[Any] = [(two.values, two.nulls) for two in pair.layers]
        rows.append((pair.summary.model, pair.summary.nulls))
        for one, (values, nulls) in zip((*found.layers, found.summary), rows, strict=True):
            series: Any = one.series
            share, null = (
                series[key][i] for key in ("changed_share_by_step", "changed_share_null")
            )
            assert share == pytest.approx(1 - values["update_sparsity_exact"], rel=1e-12)
            assert null == pytest.approx(1 - nulls["update_sparsity_exact"], rel=1e-4)
            assert 0.02 < share < 0.5


def test_a_module_is_the_mean_of_its_entries(run: Run) -> None:
    found = followed(run)
    for module, numbers in found.summary.modules.items():
        own = [one for one in found.layers if one.module == module]
        means: list[Any] = [one.values["changed_share"] for one in own]
        assert numbers["changed_share"] == pytest.approx(sum(means) / len(own))  # of one shape
    whole: Any = found.summary
    assert whole.model["sync_break_even"] == pytest.approx(1 / 3)
    share = whole.model["changed_share"]
    assert whole.model["sync_share"] == pytest.approx(3 * share)
    assert whole.model["sync_share_gaps"] == pytest.approx(2 * share)
    entries = sum(m * n for m, n in LLAMA.values())
    assert whole.model["sync_bytes"] == pytest.approx(share * entries * 6)
    assert whole.nulls["sync_share"] == pytest.approx(3 * whole.nulls["changed_share"])


def test_fp32_rewrites_every_entry_and_breaks_even_at_a_half(tmp_path: Path) -> None:
    found = followed(Run.write(tmp_path, STEPS, dtype=torch.float32))
    assert found.summary.model["changed_share"] == pytest.approx(1, abs=1e-3)
    assert found.summary.model["sync_break_even"] == 0.5
    assert found.summary.model["sync_share"] == pytest.approx(2, abs=2e-3)


def test_the_cache_gives_the_same(run: Run, tmp_path: Path) -> None:
    first, second = (followed(run, cache=tmp_path / "cache") for _ in range(2))
    assert first.layers == second.layers and first.summary == second.summary


def test_an_adapter_is_itself_what_a_sync_sends(tmp_path: Path) -> None:
    merged, folder, _ = lora_run(tmp_path, STEPS, from_zero=True)
    options = FollowOptions(base=str(merged.base), jobs=1)
    found = follow([str(folder)], options=options)
    for one in found.layers:
        for key in CHANGES:
            assert one.values[key] is None and one.status[key] is Status.NOT_APPLICABLE
        assert "changed_share_by_step" not in one.series
    assert found.summary.model["changed_share"] is None
    stored = load_file(folder / "checkpoint-40/adapter_model.safetensors")
    size = sum(one.nbytes for one in stored.values())
    (note,) = [one for one in found.provenance.parameters["notes"] if "weight sync" in one]
    assert f"the adapter itself, {size} bytes" in note


def test_a_pair_tells_what_a_sync_sends(run: Run) -> None:
    report = compare(str(run.points[0]), str(run.points[1]), kind="anisotropy", device="cpu")
    found = changes_between(report)
    changed = sum(int((run.models[1][name] != run.models[2][name]).sum()) for name in LLAMA)
    entries = sum(m * n for m, n in LLAMA.values())
    assert found["sync"] == {
        "entries": entries,
        "changed": changed,
        "bytes": 6 * changed,
        "share": pytest.approx(3 * changed / entries),
        "break_even": pytest.approx(1 / 3),
    }
    assert set(found["modules"]) == {"q_proj", "down_proj"} and set(found["layers"]) == {"0", "1"}
    by_layer = [one["changed"] for one in found["layers"].values()]
    assert sum(by_layer) / 2 == pytest.approx(changed / entries)
    assert all(0 < one["null"] < 1 for one in found["layers"].values())


# --- spectra by step -----------------------------------------------------------------------------


def test_spectra_by_step_are_the_numbers_of_compare(run: Run) -> None:
    found = followed(run, spectra=True)
    plain = followed(run)
    pairs = [compare(str(run.base), str(point)) for point in run.points]
    ids = [key for key in pairs[-1].summary.model if is_of(key, RANKS)]
    assert {"update.stable_rank", "spectral_share", "lift@8", "angle_left_mean@8"} <= set(ids)
    for key in ids:
        series = tuple(pair.summary.model[key] for pair in pairs)
        assert found.summary.series[f"{key}_by_step"] == series
        assert found.summary.model[key] == series[-1]
        assert found.summary.nulls.get(key) == pairs[-1].summary.nulls.get(key)
        for one in found.layers:
            theirs = [pair.layers[one.name] for pair in pairs]
            assert one.series[f"{key}_by_step"] == tuple(row.values[key] for row in theirs)
            assert one.status_of(key) is theirs[-1].status_of(key)
            assert one.raw.get(key) == theirs[-1].raw.get(key)
    for key, value in plain.summary.model.items():
        assert found.summary.model[key] == value
    assert "update.stable_rank" not in plain.summary.model
    assert Report.loads(found.dumps()) == found


@pytest.mark.parametrize("has_base", [True, False])
def test_spectra_of_adapters_have_their_rank_beside_them(tmp_path: Path, has_base: bool) -> None:
    merged, folder, _ = lora_run(tmp_path, STEPS, from_zero=True)
    base = str(merged.base) if has_base else None
    options = FollowOptions(base=base, jobs=1, directions=False, spectra=True)
    found = follow([str(folder)], options=options)
    for i, step in enumerate(STEPS[1:]):
        alone = measure_adapter(str(folder / f"checkpoint-{step}"), "capacity")
        shares = found.summary.series["effective_rank_share_by_step"]
        assert shares[i] == pytest.approx(alone.summary.model["effective_rank_share"])
    assert ("spectral_share" in found.summary.model) == has_base
    assert all(one.values["update.stable_rank"] is not None for one in found.layers)


# --- along the depth ------------------------------------------------------------------------------


def test_an_even_update_has_the_centre_of_the_entries(tmp_path: Path) -> None:
    found = followed(run_of(tmp_path, (0.01, 0.01)))
    assert found.summary.model["depth_centre"] == pytest.approx(0.5)
    assert found.summary.nulls["depth_centre"] == pytest.approx(0.5)
    assert found.summary.nulls[f"{SHARES}0"] == pytest.approx(0.5)


def test_the_centre_is_where_the_energy_is(tmp_path: Path) -> None:
    """Energies as 1 to 9: shares .1 and .9, and the centre at .9."""
    found = followed(run_of(tmp_path, (0.01, 0.03)))
    series = found.summary.series
    for i in range(len(STEPS) - 1):
        assert series[f"{SHARES}0_by_step"][i] == pytest.approx(0.1)
        assert series[f"{SHARES}1_by_step"][i] == pytest.approx(0.9)
        assert series["depth_centre_by_step"][i] == pytest.approx(0.9)


def test_no_energy_has_no_centre(tmp_path: Path) -> None:
    found = followed(run_of(tmp_path, (0.0, 0.0)))
    assert found.summary.model["depth_centre"] is None
    assert found.summary.model["changed_share"] == 0
