"""A base that the series did not begin at is told before anything else, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from geoscope import compare
from geoscope.errors import OptionError
from geoscope.records import Report
from geoscope.report.text import render_text
from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from tests.helpers.matrices import gaussian, save_model, updated

NAMES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
STEPS = (10, 20, 30, 40)


def weights(seed: int) -> dict[str, Tensor]:
    return {name: gaussian(48, 40, seed=seed + i).float() for i, name in enumerate(NAMES)}


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """base, checkpoint-10 … checkpoint-40, another model, and a sibling of cosine .5."""
    base, other = weights(0), weights(100)
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "other", other)
    near = {name: 0.5 * W + 0.75**0.5 * other[name] for name, W in base.items()}
    save_model(tmp_path / "sibling", near)
    for step in STEPS:
        base = {
            name: updated(W, gaussian(48, 40, seed=500 + step + i).float(), 0.01)
            for i, (name, W) in enumerate(base.items())
        }
        save_model(tmp_path / f"checkpoint-{step}", base)
    return tmp_path


def followed(folder: Path, base: str) -> Report:
    points = [str(folder / f"checkpoint-{step}") for step in STEPS]
    return follow(points, options=FollowOptions(base=str(folder / base), directions=False))


@pytest.mark.parametrize(("base", "code"), [("other", "UNRELATED"), ("sibling", "TOO_FAR")])
def test_a_base_that_is_far_comes_first(series: Path, base: str, code: str) -> None:
    report = followed(series, base)
    assert report.summary.verdict is not None
    assert report.summary.verdict.code == code
    assert report.summary.verdict.text.startswith(f"{code}: step 10 ")
    assert report.provenance.parameters["notes"][0].startswith(f"{code}: step 10 ")


def test_the_own_base_is_near_and_its_cosine_is_that_of_the_entries(series: Path) -> None:
    report = followed(series, "base")
    assert report.summary.verdict is not None
    assert report.summary.verdict.code in ("DRIFT", "NO_DRIFT")
    cosines = report.summary.series["base_cosine_by_step"]
    one = compare(series / "base", series / "checkpoint-40").summary.model["base_cosine"]
    assert cosines[-1] == pytest.approx(one, abs=1e-14)
    assert report.summary.model["base_cosine"] == cosines[-1]


def test_nothing_is_predicted_from_a_base_that_is_far(series: Path, tmp_path: Path) -> None:
    points = [str(series / f"checkpoint-{step}") for step in STEPS]
    options = FollowOptions(base=str(series / "other"))
    out = tmp_path / "out"
    with pytest.raises(OptionError, match=r"UNRELATED: step 10 .*`force`"):
        extrapolate(points, 50, out, method="hold", options=options)
    assert not out.exists()
    made = extrapolate(points, 50, out, method="hold", options=options, force=True)
    assert made.notes[0].startswith("UNRELATED")


@pytest.mark.parametrize("kind", ["collapse", "compare", "capacity", "alignment", "anisotropy"])
def test_every_command_that_compares_tells_it(series: Path, kind: str) -> None:
    report = compare(series / "base", series / "other", kind=kind)
    assert report.summary.distance is not None
    assert report.summary.distance["code"] == "UNRELATED"
    assert report.summary.distance["matrices"] == NAMES
    lines = render_text(report, width=100, colour=False).splitlines()
    assert lines[lines.index("") + 1].startswith("UNRELATED")  # what follows the title
    assert Report.loads(report.dumps()) == report
