"""A vocabulary that grows in a series: the rows that all models have are followed, as if cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geoscope.errors import OptionError
from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions

EMBED = "model.embed_tokens.weight"
INSIDE = "model.layers.0.self_attn.q_proj.weight"


def run(folder: Path, rows: tuple[int, ...], *, cut: bool = False) -> list[str]:
    """A base and checkpoints with so many rows of the same embedding; cut: to the fewest."""
    generator = torch.Generator().manual_seed(0)
    paths: list[str] = []
    embed, inside = (torch.randn(shape, generator=generator) for shape in ((12, 6), (6, 6)))
    for step, count in enumerate(rows):
        path = folder / ("base" if step == 0 else f"step_{step}")
        path.mkdir(parents=True)
        kept = embed[: min(rows) if cut else count].clone()
        save_file({EMBED: kept, INSIDE: inside.clone()}, path / "model.safetensors")
        embed = embed + torch.randn(embed.shape, generator=generator)
        inside = inside + torch.randn(inside.shape, generator=generator)
        paths.append(str(path))
    return paths


ROWS = (10, 12, 9, 11)


def test_the_common_rows_are_followed_as_if_nothing_else_were_there(tmp_path: Path) -> None:
    base, *steps = run(tmp_path / "whole", ROWS)
    found = follow(steps, base=base, include=("embed", "q_proj"), allow_vocab_resize=True)
    base, *steps = run(tmp_path / "cut", ROWS, cut=True)
    alone = follow(steps, base=base, include=("embed", "q_proj"))
    assert {one.name: one.values for one in found.layers} == {
        one.name: one.values for one in alone.layers
    }
    assert {one.name: one.shape for one in found.layers} == {EMBED: (9, 6), INSIDE: (6, 6)}
    note = f"{EMBED}: 9 or 10 or 11 or 12 rows; the first 9, which all models have, are followed"
    assert note in found.provenance.parameters["notes"]
    assert not found.coverage.missing


def test_without_the_option_it_is_missing_and_a_note_says_why(tmp_path: Path) -> None:
    base, *steps = run(tmp_path, ROWS)
    found = follow(steps, base=base, include=("embed", "q_proj"))
    assert [one.name for one in found.layers] == [INSIDE]
    assert EMBED in found.coverage.missing
    notes = [one for one in found.provenance.parameters["notes"] if "allow_vocab_resize" in one]
    assert notes[0].startswith(f"{EMBED}: 10 rows in the base, 12 in a checkpoint; ")


def test_a_predicted_model_is_whole(tmp_path: Path) -> None:
    options = FollowOptions(allow_vocab_resize=True)
    with pytest.raises(OptionError, match="a predicted model has whole tensors"):
        extrapolate(["a", "b"], 5, tmp_path / "out", options=options)
