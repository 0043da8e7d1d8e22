"""What is remarked on how a pair is stored, and which pairs have rounding cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from geoscope.linalg.changes import Side, side
from geoscope.linalg.grids import Grid
from geoscope.metrics.providers import cells
from geoscope.metrics.storage_notes import storage_notes
from geoscope.records import Quantisation
from tests.helpers.matrices import gaussian

CODES = Quantisation("NF4", 0.09, 3, 1.0)
GRID = Grid("int8 grid by row", 1e-6)


def stored(*, is_short: bool = False, **facts: Any) -> Side:
    """fp32 numbers; with `is_short` those of bf16."""
    weight = gaussian(40, 40, seed=1).float()
    return replace(side(weight.bfloat16().float() if is_short else weight), **facts)


def notes(before: Side, after: Side) -> tuple[str, ...]:
    return storage_notes(torch.float32, torch.float32, before, after, base_counts=False)


def test_a_short_format_in_a_wide_file_is_remarked_on_unless_codes_explain_it() -> None:
    plain, short = stored(), stored(is_short=True)
    assert notes(plain, plain) == ()
    assert notes(short, plain)[0] == "base is stored as float32 and holds only bfloat16 numbers"
    assert notes(plain, short)[0] == "tuned is stored as float32 and holds only bfloat16 numbers"
    kinds: tuple[dict[str, Any], ...] = ({"quantisation": CODES}, {"grid": GRID})
    for facts in kinds:
        (told,) = notes(stored(is_short=True, **facts), plain)
        assert told.startswith(("base is NF4", "base lies on an int8 grid"))


@pytest.mark.parametrize("facts", [{"quantisation": CODES}, {"grid": GRID}])
def test_a_grid_on_either_side_hides_the_rounding_cells_of_a_pair(facts: dict[str, Any]) -> None:
    plain, coarse = stored(), stored(**facts)
    assert cells([plain], [plain]) == ((plain, plain),)
    for before, after in ((coarse, plain), (plain, coarse), (coarse, coarse)):
        assert cells([before], [after]) is None
        assert cells([plain, before], [plain, after]) == ((plain, plain), None)
