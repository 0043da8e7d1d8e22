"""Do boxes make a tensor, whole and in any part, and are those that do not told?"""

from __future__ import annotations

import random

import pytest
import torch

from geoscope.formats.pieces import Piece, Pieced, flaw, read_part, read_whole

SHAPES = [(), (1,), (7,), (5, 4), (1, 9), (6, 1), (4, 3, 5), (3, 2, 2, 3)]


def cut(shape: tuple[int, ...], seed: int) -> list[Piece[int]]:
    """Boxes that fill the shape: cut in two again and again, empty ones among them."""
    choose = random.Random(seed)
    boxes = [(tuple(0 for _ in shape), shape)]
    for _ in range(6):
        offsets, sizes = boxes.pop(choose.randrange(len(boxes)))
        dim = choose.randrange(len(shape))
        at = choose.randint(0, sizes[dim])
        first, second, begin = list(sizes), list(sizes), list(offsets)
        first[dim], second[dim], begin[dim] = at, sizes[dim] - at, offsets[dim] + at
        boxes += [(offsets, tuple(first)), (tuple(begin), tuple(second))]
    return [Piece(offsets, sizes, number) for number, (offsets, sizes) in enumerate(boxes)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_reads_back_in_any_part(shape: tuple[int, ...], seed: int) -> None:
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    rows = whole.reshape(shape or (1,))
    pieces = cut(shape or (1,), seed)
    assert flaw(shape, pieces) is None
    touched: set[int] = set()

    def fill(target: torch.Tensor, piece: Piece[int], begin: int, end: int) -> None:
        touched.add(piece.place)
        box = rows
        for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
            box = box.narrow(dim, offset, size)
        target.copy_(box[begin:end])

    stored = Pieced(shape, "int16", tuple(pieces))
    buffer = torch.full((whole.numel() * 2 + 3,), 0xAB, dtype=torch.uint8)
    assert torch.equal(read_whole(stored, fill, None), whole)
    assert torch.equal(read_whole(stored, fill, buffer), whole)
    assert (buffer[-3:] == 0xAB).all()
    flat = whole.reshape(-1)
    for begin in range(whole.numel() + 1):
        for end in range(begin, whole.numel() + 1):
            assert torch.equal(read_part(stored, fill, begin, end), flat[begin:end])
    touched.clear()
    read_part(stored, fill, 0, 1)
    first_row = {one.place for one in pieces if one.offsets[0] == 0 and min(one.sizes) > 0}
    assert touched == first_row


@pytest.mark.parametrize("seed", range(8))
def test_a_lost_a_moved_and_a_doubled_box_are_told(seed: int) -> None:
    shape = (5, 4, 3)
    pieces = [one for one in cut(shape, seed) if min(one.sizes) > 0]
    assert len(pieces) > 1
    lost, *rest = pieces
    assert flaw(shape, rest) is not None
    assert flaw(shape, [*pieces, lost]) is not None
    far = Piece((5, 0, 0), lost.sizes, 0)
    assert "sticks out" in str(flaw(shape, [far, *rest]))
    same_size = [one for one in rest if one.sizes == lost.sizes]
    for other in same_size:
        assert flaw(shape, [Piece(other.offsets, lost.sizes, 0), *rest]) == "two pieces overlap"


def test_boxes_of_the_right_count_that_overlap_in_a_corner() -> None:
    """As many entries as the tensor, and yet a hole."""
    pieces = [Piece((0, 0), (2, 2), 0), Piece((1, 1), (2, 2), 1), Piece((0, 2), (1, 1), 2)]
    assert flaw((3, 3), pieces) == "two pieces overlap"
    stripes = [Piece((0, 0), (2, 3), 0), Piece((1, 0), (1, 3), 1)]
    assert flaw((3, 3), stripes) == "two pieces overlap"
    assert flaw((3, 3), [Piece((0, 0), (2, 3), 0), Piece((2, 0), (1, 3), 1)]) is None


def test_an_empty_tensor_has_no_pieces() -> None:
    stored = Pieced((0, 4), "float32", ())
    assert flaw((0, 4), []) is None
    assert read_whole(stored, lambda *_: None, None).shape == (0, 4)
    assert read_part(stored, lambda *_: None, 0, 0).shape == (0,)
