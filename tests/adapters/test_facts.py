"""The facts of an initialisation: their nulls, and what they say of a Gaussian matrix."""

from __future__ import annotations

import pytest
import torch

from geoscope.adapters.facts import FACTS, ILL_CONDITIONED, captured, completed, gap_note
from geoscope.adapters.geora import geora
from geoscope.records import Status
from tests.helpers.matrices import gaussian


def test_captured_is_all_or_nothing_along_and_across() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    S = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert captured(S, axes[:2], axes[:2]) == 1.0
    assert captured(S, axes[:2], axes[2:4]) == 0.0
    assert captured(S, axes[:2], axes[:1]) == pytest.approx(4 / 5)


def test_what_is_missing_does_not_apply() -> None:
    facts, status = completed({"gap": 0.5, "relative_norm": 0.0})
    assert tuple(facts) == FACTS
    assert facts["gap"] == 0.5 and facts["relative_norm"] == 0.0
    assert set(status) == set(FACTS) - {"gap", "relative_norm"}
    assert set(status.values()) == {Status.NOT_APPLICABLE}


def test_notes_on_the_gap() -> None:
    assert gap_note(ILL_CONDITIONED) == gap_note(None) == ()
    (note,) = gap_note(1e-5)
    assert note.startswith("ill-conditioned subspace") and "\n" not in note


def test_gaussian_weights_meet_their_nulls() -> None:
    """Masking alone raises captured energy a little; the two masks are nearly independent."""
    W = gaussian(512, 512, seed=1)
    found = geora(W, 16)
    facts = {key: value for key, value in found.facts.items() if value is not None}
    assert facts["density_spec"] == pytest.approx(0.2, abs=1e-5)
    assert facts["density_euc"] == pytest.approx(0.2, abs=1e-5)
    assert facts["density_intersection"] == pytest.approx(
        found.nulls["density_intersection"], rel=0.2
    )
    assert facts["jaccard"] == pytest.approx(found.nulls["jaccard"], rel=0.2)
    assert 1.0 < facts["captured_energy"] / found.nulls["captured_energy"] < 1.3
    assert 0 < facts["head_energy"] < found.nulls["head_energy"]


def test_facts_stand_on_the_matrix_and_not_on_its_scale() -> None:
    W = gaussian(80, 60, seed=2)
    one, two = geora(W, 4).facts, geora(4 * W, 4).facts
    for key in FACTS:
        factor = 4 if key.startswith("tau") else 1
        assert two[key] == pytest.approx(factor * float(one[key] or 0), rel=1e-9), key
