"""Do the requests cover what is wanted, once, and little else? And does the cache keep it whole?"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoscope.sources.hub.byte_ranges import Piece, Run, Span, runs
from geoscope.sources.hub.range_cache import RangeCache

LENGTHS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 400)), max_size=30)


def pieces_of(lengths: list[tuple[int, int]]) -> list[Piece]:
    """Gap and length, one behind the other."""
    found, position = [], 8
    for gap, length in lengths:
        span = Span(position + gap, position + gap + length)
        found.append(Piece(span, span.begin))
        position = span.end
    return found


@given(LENGTHS, st.integers(0, 100), st.floats(0, 0.5), st.randoms())
@settings(max_examples=200, deadline=None)
def test_every_piece_once_in_order_and_gaps_within_bounds(
    lengths: list[tuple[int, int]], gap: int, share: float, random: object
) -> None:
    pieces = pieces_of(lengths)
    shuffled = list(pieces)
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    found = runs(shuffled, gap=gap, share=share)
    assert [piece for run in found for piece in run.pieces] == pieces
    wanted = sum(piece.span.end - piece.start for piece in pieces)
    assert wanted <= sum(run.nbytes for run in found) <= (1 + share) * wanted
    for run in found:
        for left, right in pairwise(run.pieces):
            assert right.start - left.span.end <= gap
    for left, right in pairwise(found):
        assert right.begin > left.end  # neighbours are always joined


def test_neighbours_are_one_request_and_far_ones_are_not() -> None:
    near = [Piece(Span(0, 100), 0), Piece(Span(100, 300), 100)]
    far = Piece(Span(900, 1000), 900)
    assert runs([*near, far]) == (Run(tuple(near)), Run((far,)))
    assert runs([*near, far], share=3.0) == (Run((*near, far)),)
    assert runs([]) == ()


@given(st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_bytes_of_a_run_land_in_their_files(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, lengths: list[int]
) -> None:
    """However the bytes are cut, and wherever a break falls."""
    cache = RangeCache(tmp_path_factory.mktemp("cache"))
    file = bytes(i * 37 % 251 for i in range(8 + sum(lengths) * 2))
    pieces = pieces_of([(length % 7, length) for length in lengths])
    middle = sum(lengths) // 2
    with cache.lock():
        for stop in (middle, len(file)):
            missing = [cache.missing(one.span) for one in pieces if not cache.has(one.span)]
            for run in runs(missing, share=10.0):
                with cache.sink(run) as sink:
                    end = min(run.end, run.begin + stop)
                    for start in range(run.begin, end, chunk):
                        sink.write(file[start : min(start + chunk, end)])
    for one in pieces:
        assert cache.has(one.span)
        assert cache.path(one.span).read_bytes() == file[one.span.begin : one.span.end]
    assert not list(cache.folder.glob("*.part"))


def test_a_kept_file_of_another_size_is_not_believed(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path)
    cache.path(Span(8, 16)).write_bytes(b"1234567")
    assert not cache.has(Span(8, 16))
    cache.path(Span(8, 16)).write_bytes(b"12345678")
    assert cache.has(Span(8, 16))
