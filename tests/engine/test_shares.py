"""Is the work shared out whole, evenly, by files, and in small shares?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from geoscope.engine.shares import Work, fitting, shared

FILES = ("a", "b", "c", "d")
SMALL = Work((FILES[0],), 0.02, 10**6)
WORKS = [replace(SMALL, files=(FILES[i % 4],)) for i in range(400)]


@pytest.mark.parametrize("of", [1, 3, 4, 7, 400])
def test_every_item_is_in_one_share_in_its_order(of: int) -> None:
    parts = shared(range(400), WORKS, of)
    assert len(parts) == of
    assert sorted(i for part in parts for i in part) == [*range(400)]
    assert all(list(part) == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_share_reads_few_files() -> None:
    """Four files in eight shares: none reads two."""
    for part in shared(range(400), WORKS, 8):
        assert len({WORKS[i].files for i in part}) == 1


def test_shares_are_cut_by_seconds_bytes_and_count() -> None:
    assert fitting([SMALL] * 100) == 1
    assert fitting([SMALL] * 2560) == 10
    assert fitting([replace(SMALL, computing=4.9)] * 20) == 10
    assert fitting([replace(SMALL, nbytes=10**9)] * 7) == 7
    assert fitting([replace(SMALL, computing=1e4)]) == 1


def test_one_long_item_fills_a_share() -> None:
    works = [replace(SMALL, files=(f"{i}",), computing=30.0 if i == 1 else 1.0) for i in range(11)]
    parts = shared(range(11), works, 4)
    (long,) = [part for part in parts if 1 in part]
    assert len(long) <= 3
