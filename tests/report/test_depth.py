"""The lines of small bars: means by block, from 0, and nothing where there is nothing to see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from geoscope.kinds import KINDS
from geoscope.records import LayerRecord, Report
from geoscope.report import render_text
from geoscope.report.depth import depth_block, depth_row
from geoscope.report.sections import sections
from tests.helpers.examples import example, plain

KIND = KINDS["collapse"]


def with_sizes(sizes: dict[int, tuple[float | None, ...]]) -> Report:
    """Blocks of matrices, each with a relative update."""
    rows = [
        LayerRecord(f"{block}.{i}", block, "x", (64, 64), values={"relative_update": size})
        for block, own in sizes.items()
        for i, size in enumerate(own)
    ]
    return replace(example("collapse", layers=1), layers=tuple(rows))


def drawn(report: Report) -> list[list[str]]:
    grid = depth_block(KIND, sections(report)[0]).grid
    return [] if grid is None else [[cell.text for cell in row] for row in grid.rows]


def test_a_bar_is_the_mean_of_a_block_over_the_largest() -> None:
    report = with_sizes({0: (0.01, 0.03), 1: (0.04,), 2: (None,), 5: (0.0, None)})
    assert drawn(report) == [["ρ", "▅█ ▁", "0", ".0400"]]
    block = depth_block(KIND, sections(report)[0])
    assert block.grid is not None
    assert block.grid.heads[1].text == "blocks 0 … 5"


def test_many_blocks_are_drawn_in_groups() -> None:
    report = with_sizes({block: (float(block + 1),) for block in range(96)})
    ((_, bars, least, largest),) = drawn(report)
    assert len(bars) == 48
    assert list(bars) == sorted(bars) and bars[0] == "▁" and bars[-1] == "█"
    assert (float(least), float(largest)) == pytest.approx((1.5, 95.5))
    assert "48 groups" in depth_block(KIND, sections(report)[0]).lines[0]


@pytest.mark.parametrize("sizes", [{}, {0: (0.1,), 1: (0.1,)}, dict.fromkeys(range(4), (None,))])
def test_there_is_none_without_depth_or_numbers(sizes: dict[int, tuple[float | None, ...]]) -> None:
    block = depth_block(KIND, sections(with_sizes(sizes))[0])
    assert not block.lines
    assert not drawn(with_sizes(sizes))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_details_have_it_and_the_answer_does_not(kind: str) -> None:
    report = example(kind, layers=4)
    assert "by depth" in plain(report)
    assert "by depth" not in render_text(report, width=80, colour=False)


@pytest.mark.parametrize(("norm", "count"), [(1.0, 2), (1e308, 0), (0.0, 0)])
def test_energies_that_have_no_shares_make_no_row(norm: float, count: int) -> None:
    report = example("compare", layers=4)
    layers = tuple(
        replace(layer, values={**layer.values, "update.frobenius_norm": norm})
        for layer in report.layers
    )
    assert len(depth_row(sections(replace(report, layers=layers))[0])) == count
