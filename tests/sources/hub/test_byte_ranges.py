"""Do the requests cover what is wanted, once, and little else? And does the cache keep it whole?"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoscope.sources.hub.byte_ranges import Piece, Run, Span, runs
from geoscope.sources.hub.range_cache import (
    RangeCache,
    cached_listing,
    clear_tensors,
    keep_listing,
    kept_tensors,
    tensors_folder,
)

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


SPAN = Span(8, 40)


def kept(folder: Path) -> RangeCache:
    cache = RangeCache(folder)
    with cache.lock(), cache.sink(Run((Piece(SPAN, SPAN.begin),))) as sink:
        sink.write(bytes(range(32)))
    assert cache.has(SPAN)
    return cache


def test_a_kept_tensor_with_one_flipped_bit_is_fetched_again(tmp_path: Path) -> None:
    cache = kept(tmp_path)
    content = bytearray(cache.path(SPAN).read_bytes())
    content[20] ^= 1
    cache.path(SPAN).write_bytes(content)
    assert not cache.has(SPAN)
    assert cache.missing(SPAN) == Piece(SPAN, SPAN.begin)
    assert kept(tmp_path).path(SPAN).read_bytes() == bytes(range(32))


def test_a_kept_tensor_without_its_checksum_is_fetched_again(tmp_path: Path) -> None:
    cache = kept(tmp_path)
    (tmp_path / "8-40.sha256").unlink()
    assert not cache.has(SPAN)


def test_a_changed_header_is_not_believed(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "file")
    cache.keep_header(b"12345678{}")
    assert cache.header() == b"12345678{}"
    (tmp_path / "file" / "header").write_bytes(b"12345678{ ")
    assert cache.header() is None


def test_a_changed_listing_is_not_believed(tmp_path: Path) -> None:
    keep_listing("org/name", "a" * 40, {"model.safetensors": 12})
    assert cached_listing("org/name", "a" * 40) == {"model.safetensors": 12}
    (listing,) = tmp_path.rglob("listing.json")
    listing.write_text('{"model.safetensors": 13}')
    assert cached_listing("org/name", "a" * 40) is None


def test_clear_leaves_the_cache_of_others_and_follows_no_link(tmp_path: Path) -> None:
    """Where both lie in one folder, as with GEOSCOPE_CACHE=~/.cache/huggingface."""
    theirs = tensors_folder() / "models--org--name" / "snapshots" / ("a" * 40)
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("{}")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "8-40").write_text("mine")
    for name in ("models--a--b", f"models--c--d/{'b' * 40}", f"models--e--f/{'c' * 40}/file"):
        link = tensors_folder() / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(mine)
    keep_listing("org/name", "a" * 40, {"model.safetensors": 12})
    kept(RangeCache.of("org/name", "a" * 40, "model.safetensors").folder)
    assert len(list(kept_tensors())) == 1
    assert clear_tensors() == 1
    assert (
        list(kept_tensors()) == []
        and not (tensors_folder() / "models--org--name" / ("a" * 40)).exists()
    )
    assert (theirs / "config.json").exists() and (mine / "8-40").read_text() == "mine"
