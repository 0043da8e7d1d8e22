"""What is W where a file holds codes and scales, of whatever format?

    W_i = number(code_i) · scale(block of i)        in fp32, each entry multiplied once

Storing W so rounds each entry to the nearest number times the scale of its block. What it lost is
√12 of a uniform error's deviation, gap(code_i) · scale: the gap is the spacing of the number.
A format is a class of this form and a function that finds its weights in the headers of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from geoscope.formats.container import Container
from geoscope.records import Quantisation, TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Files", "Quantised", "ScaleLayout", "cells", "scaled"]


class Files(Protocol):
    """Where stored tensors are read from."""

    def open(self, file: str) -> Container: ...


@dataclass(frozen=True)
class ScaleLayout:
    """Which scale an entry has. rows, columns: sides of each stored matrix. block: sides of a
    block; the last ones of a matrix may be cut."""

    rows: int
    columns: int
    block: tuple[int, int]


@dataclass(frozen=True)
class Quantised:
    """One weight of codes and scales.

    info: the weight as it is read. codes, scale: the stored tensors. kind: what storing does.
    turned: whether it is read as (…, columns, rows) of the stored matrices, as the live model
    has it.
    """

    info: TensorInfo
    codes: TensorInfo
    scale: TensorInfo
    layout: ScaleLayout
    kind: Quantisation
    turned: bool = False

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The stored tensors that it is read from."""
        return self.codes, self.scale

    def entries(self, files: Files, begin: int, end: int) -> torch.Tensor:
        """Entries begin … end − 1 of W, fp32, 1-D."""
        return self._made(files, begin, end, self.numbers)

    def gaps(self, files: Files, begin: int, end: int) -> torch.Tensor:
        """√12 times the deviation of the rounding error of each entry, fp32, 1-D."""
        return self._made(files, begin, end, self.spacings)

    # --- what a format says

    def numbers(self, files: Files, begin: int, end: int) -> torch.Tensor:
        """The numbers of the stored codes begin … end − 1, fp32, memory of its own."""
        raise NotImplementedError

    def spacings(self, files: Files, begin: int, end: int) -> torch.Tensor:
        """Their gaps at scale 1, fp32, memory of its own."""
        raise NotImplementedError

    def scales(self, files: Files) -> torch.Tensor:
        """The scale of every block, in the order of the blocks; fp32."""
        return files.open(self.scale.source).read(self.scale.name, None).float()

    # --- the same for all

    def _made(
        self,
        files: Files,
        begin: int,
        end: int,
        numbers: Callable[[Files, int, int], torch.Tensor],
    ) -> torch.Tensor:
        import torch

        scales = self.scales(files)
        if not self.turned:
            return scaled(numbers(files, begin, end), begin, scales, self.layout)
        rows, columns = self.layout.rows, self.layout.columns
        size, parts = rows * columns, []
        for first in range(begin // size * size, end, size):
            values = scaled(numbers(files, first, first + size), first, scales, self.layout)
            flat = values.view(rows, columns).T.reshape(-1)
            parts.append(flat[max(begin - first, 0) : end - first])
        return torch.cat(parts) if parts else torch.empty(0, device="cpu")


def scaled(
    values: torch.Tensor, begin: int, scales: torch.Tensor, layout: ScaleLayout
) -> torch.Tensor:
    """fp32 entries begin … of a stored tensor, in its order, times the scales of their blocks.

    values: 1-D, changed in place. scales: fp32, in the order of the blocks.
    """
    rows, columns = layout.rows, layout.columns
    height, width = layout.block
    if height == 1 and columns % width == 0:
        return _by_runs(values, begin, scales.reshape(-1), width)
    table = scales.reshape(-1, -(-columns // width))
    high = -(-rows // height)  # rows of the table for each matrix
    done = 0
    while done < len(values):
        row, column = divmod(begin + done, columns)
        matrix, row = divmod(row, rows)
        factors = table[matrix * high + row // height].repeat_interleave(width)[:columns]
        left = len(values) - done
        count = 0
        if column == 0:  # whole rows, to the end of their blocks
            count = min(height - row % height, rows - row, left // columns)
        if count:
            values[done : done + count * columns].view(count, columns).mul_(factors)
            done += count * columns
        else:
            length = min(columns - column, left)
            values[done : done + length].mul_(factors[column : column + length])
            done += length
    return values


def _by_runs(values: torch.Tensor, begin: int, scales: torch.Tensor, width: int) -> torch.Tensor:
    """The same where each scale is that of `width` entries in a row, the last run may be cut."""
    head = min(-begin % width, len(values))
    first = (begin + head) // width
    whole = (len(values) - head) // width
    tail = head + whole * width
    values[:head].mul_(scales[begin // width])
    values[head:tail].view(whole, width).mul_(scales[first : first + whole, None])
    if tail < len(values):
        values[tail:].mul_(scales[first + whole])
    return values


def cells(numbers: torch.Tensor) -> torch.Tensor:
    """√12 times the deviation of what rounds to each of some numbers, uniform in its cell; fp32.

    numbers: fp32, in any order, some twice. A cell ends half way to the neighbours; the outermost
    ones are as wide outside as inside.
    """
    levels, place = numbers.double().unique(return_inverse=True)
    half = levels.diff() / 2
    below, above = half[[0, *range(len(half))]], half[[*range(len(half)), -1]]
    moments = (above**3 + below**3) / (above + below) / 3
    return (12 * moments).sqrt().float()[place]
