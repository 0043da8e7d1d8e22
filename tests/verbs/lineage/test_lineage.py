"""`lineage` over whole models: what is read, what is said, adapters, vocabularies, grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import geoscope
from geoscope.errors import OptionError, PairingError
from geoscope.records import Report
from tests.helpers.families import Updates, drawn, merged, tuned
from tests.helpers.matrices import save_model
from tests.helpers.quantisers import GRIDS

BASE = drawn(0, layers=4)
PARENT = tuned(BASE, 1, Updates(size=0.1))
MODEL = tuned(PARENT, 2, Updates(size=0.08))
SIBLING = tuned(PARENT, 3, Updates(size=0.08))
Weights = Mapping[str, Tensor]


def code(report: Report) -> str:
    assert report.summary.verdict is not None
    return report.summary.verdict.code


def roles(report: Report) -> list[str]:
    verdicts = [run.verdict for run in report.summary.runs]
    return [verdict.code for verdict in verdicts if verdict is not None]


# --- what is read ---------------------------------------------------------------------------------


def test_a_sample_decides_and_the_others_are_listed() -> None:
    report = geoscope.lineage(MODEL, BASE, PARENT, SIBLING)
    assert (code(report), roles(report)) == ("DESCENDS", ["ANCESTOR", "PARENT", "SIBLING"])
    coverage = report.coverage
    assert coverage.status == "SAMPLE"
    assert len(coverage.matched) < 12
    assert len(coverage.matched) + len(coverage.unread) == 12
    assert {one.name for one in report.layers} == set(coverage.matched)
    assert report.summary.lineage is not None
    assert report.summary.lineage["clear"]
    assert report.summary.lineage["parents"] == [2, None, 1, 2]


def test_the_seed_chooses_the_sample_and_all_reads_everything() -> None:
    first, other = (geoscope.lineage(MODEL, PARENT, seed=seed) for seed in (0, 1))
    assert set(first.coverage.matched) != set(other.coverage.matched)
    whole = geoscope.lineage(MODEL, PARENT, all_matrices=True)
    assert (whole.coverage.status, len(whole.coverage.matched)) == ("COMPLETE", 12)
    assert whole.coverage.matched[:8] == first.coverage.matched


def test_a_copy_is_claimed_only_of_all_matrices() -> None:
    assert code(report := geoscope.lineage({**PARENT}, BASE, PARENT)) == "COPY"
    assert report.coverage.status == "COMPLETE"
    last = geoscope.lineage(MODEL, MODEL, seed=0).coverage.matched[-1]
    assert code(geoscope.lineage({**MODEL, last: PARENT[last]}, MODEL)) != "COPY"


def test_numbers_are_those_of_the_pooled_matrices() -> None:
    report = geoscope.lineage(MODEL, BASE, PARENT, all_matrices=True)
    names = report.coverage.matched
    W, P = (torch.cat([one[name].double().ravel() for name in names]) for one in (MODEL, PARENT))
    values = report.summary.runs[1].model
    difference = W - P
    assert values["base_cosine"] == pytest.approx(float(W @ P / (W.norm() * P.norm())))
    assert values["relative_update"] == pytest.approx(float(difference.norm() / P.norm()))
    grown = (W @ W - P @ P) / (difference @ difference)
    assert values["growth"] == pytest.approx(float(grown))
    equal = (W.bfloat16() == P.bfloat16()).double().mean()
    assert values["update_sparsity"] == pytest.approx(float(equal), abs=0.01)
    compared = geoscope.compare(PARENT, MODEL, kind="collapse", layers=0, quick=True)
    layer = compared.layers[0]
    own = next(one for one in report.layers if one.name == layer.name and one.tuned == 2)
    for key in ("base_cosine", "relative_update", "precision_ratio"):
        assert own.values[key] == pytest.approx(layer.values[key])


def test_a_report_reads_back_equal() -> None:
    report = geoscope.lineage(MODEL, BASE, PARENT)
    assert type(report).loads(report.dumps()) == report
    assert json.loads(report.dumps())["coverage"]["status"] == "SAMPLE"


# --- models that differ in more than blocks -------------------------------------------------------


def test_a_resized_vocabulary_and_a_new_head_do_not_matter() -> None:
    rows = torch.randn(8, 48, generator=torch.Generator().manual_seed(7))
    embedding = torch.cat([MODEL["model.embed_tokens.weight"], rows])
    wide = {**MODEL, "model.embed_tokens.weight": embedding}
    wide["lm_head.weight"] = torch.randn(88, 48, generator=torch.Generator().manual_seed(8))
    report = geoscope.lineage(wide, BASE, PARENT)
    assert (code(report), roles(report)) == ("DESCENDS", ["ANCESTOR", "PARENT"])
    # The rows that both have are equal, the head is not.
    assert report.summary.runs[1].model["equal_embeddings"] == 0.5


def test_a_tied_head_is_no_tensor_of_its_own() -> None:
    def tied(weights: Weights) -> dict[str, Tensor]:
        embedding = weights["model.embed_tokens.weight"]
        return {**weights, "lm_head.weight": embedding}

    report = geoscope.lineage(tied(MODEL), tied(BASE), PARENT)
    assert roles(report) == ["ANCESTOR", "PARENT"]
    assert report.summary.runs[0].model["equal_embeddings"] == 1


def test_a_shared_embedding_tells_siblings_trained_alike_from_a_line() -> None:
    short = {name: BASE[name] + 0.5 * (MODEL[name] - BASE[name]) for name in BASE}
    alike = tuned(short, 5, Updates(size=0.01))
    assert roles(geoscope.lineage(MODEL, BASE, alike))[1] == "PARENT"
    moved = {**alike, "model.embed_tokens.weight": alike["model.embed_tokens.weight"] + 0.01}
    assert roles(geoscope.lineage(MODEL, BASE, moved)) == ["PARENT", "SIBLING"]


def test_other_shapes_are_set_aside_with_a_reason() -> None:
    small = {name: weight[:24] for name, weight in drawn(5, layers=4).items()}
    report = geoscope.lineage(MODEL, small, PARENT)
    assert (code(report), roles(report)) == ("DESCENDS", ["OTHER_SHAPES", "PARENT"])
    assert any("nothing to compare" in note for note in report.provenance.parameters["notes"])
    with pytest.raises(PairingError, match="nothing to compare"):
        geoscope.lineage(MODEL, small)


def test_a_matrix_with_nan_is_missing_and_the_rest_decides() -> None:
    bad = {name: weight.clone() for name, weight in PARENT.items()}
    bad["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    report = geoscope.lineage(MODEL, BASE, bad, all_matrices=True)
    assert report.coverage.missing == ("model.layers.0.mlp.up_proj.weight",)
    assert roles(report) == ["ANCESTOR", "PARENT"]


# --- copies in other numbers, merges, adapters ----------------------------------------------------


@pytest.mark.parametrize("grid", ["int8 row", "int4 64"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_quantised_copy_is_known_in_either_direction(grid: str, turned: bool) -> None:
    rounded = {
        name: GRIDS[grid][0](weight.double()).float() if ".layers." in name else weight
        for name, weight in PARENT.items()
    }
    pair = (PARENT, rounded) if turned else (rounded, PARENT)
    report = geoscope.lineage(pair[0], BASE, pair[1])
    assert (code(report), roles(report)[1]) == ("QUANTISED", "QUANTISED")
    assert report.summary.verdict is not None
    assert GRIDS[grid][1].split(" grid")[0] in report.summary.verdict.text
    assert report.summary.runs[1].model["copy_share"] == pytest.approx(1, abs=0.15)


def test_a_merge_is_told_with_its_weights() -> None:
    model = merged([(0.4, MODEL), (0.6, SIBLING)], torch.float32)
    report = geoscope.lineage(model, BASE, MODEL, SIBLING)
    assert code(report) == "MERGE"
    assert report.summary.lineage is not None
    assert report.summary.lineage["weights"] == pytest.approx({"2": 0.4, "3": 0.6}, abs=1e-3)
    assert report.summary.verdict is not None
    assert ".400·candidate 2" in report.summary.verdict.text


def lora(folder: Path, base: Path, *, seed: int) -> Path:
    """A LoRA of rank 4 of the query and up projections, as PEFT writes it."""
    made = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(4):
        for module, (m, n) in {"self_attn.q_proj": (48, 48), "mlp.up_proj": (96, 48)}.items():
            stem = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors[f"{stem}A.weight"] = torch.randn(4, n, generator=made) * 0.05
            tensors[f"{stem}B.weight"] = torch.randn(m, 4, generator=made) * 0.05
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    config["target_modules"] = ["q_proj", "up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_lies_over_its_base_and_is_found_beside_other_models(tmp_path: Path) -> None:
    base, parent = save_model(tmp_path / "base", BASE), save_model(tmp_path / "parent", PARENT)
    adapter = lora(tmp_path / "adapter", parent, seed=4)
    report = geoscope.lineage(adapter, base, parent)
    assert (code(report), roles(report)) == ("DESCENDS", ["ANCESTOR", "PARENT"])
    assert not any("down_proj" in name for name in report.coverage.matched[:8])
    other = lora(tmp_path / "other", parent, seed=5)
    report = geoscope.lineage(f"{parent}+{adapter}", parent, other, base)
    assert roles(report) == ["PARENT", "SIBLING", "ANCESTOR"]


# --- what is refused ------------------------------------------------------------------------------


def test_what_it_refuses() -> None:
    with pytest.raises(OptionError, match="one candidate is needed"):
        geoscope.lineage(MODEL)
    with pytest.raises(OptionError, match="is not an option"):
        geoscope.lineage(MODEL, BASE, every=True)
    with pytest.raises(OptionError, match="no threshold"):
        geoscope.lineage(MODEL, BASE, limits={"lineage.nothing": 1.0})
