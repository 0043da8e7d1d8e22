"""Which weights of a model are numbers of four bits, two in a byte, and what scales have they?

MXFP4: the numbers of E2M1, the lower half of a byte first, a power of two for 32 in a row
    X_blocks (E, R, C/32, 16), X_scales (E, R, C/32)       gpt-oss: live, X is (E, C, R)
    X.weight int8 (R, C/2), X.scale (R, C/32)              experts of DeepSeek-V4
    X.weight_packed (R, C/2), X.weight_scale (R, C/32)     compressed-tensors
bitsandbytes NF4 and FP4: sixteen numbers in X.weight.quant_map, the upper half first
    X.weight (⌈N/2⌉, 1), X.weight.absmax: the scale of `blocksize` entries in a row
    nested: absmax = nested_quant_map[code] · nested_absmax + nested_offset
    X.weight.quant_state.bitsandbytes__nf4: JSON with the shape, the block sizes, the offset
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.foreign import COUNT, parsed
from geoscope.formats.fp8 import MX_BLOCK, power_scales
from geoscope.formats.quantised import Files, Quantised, ScaleLayout, cells, scaled
from geoscope.records import Quantisation, TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["BnbWeight", "MxWeight", "bnb_states", "bnb_weight", "mx_weights"]

_BYTES = frozenset({"uint8", "int8"})
_POWERS = frozenset({"float8_e8m0fnu", "uint8"})
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MXFP4 = Quantisation("MXFP4", 0.114, 1)
# Of Gaussian weights in blocks of 64, measured.
_BNB = {
    "nf4": Quantisation("bitsandbytes NF4", 0.092, 1),
    "fp4": Quantisation("bitsandbytes FP4", 0.12, 1),
}


def _halves(files: Files, codes: TensorInfo, begin: int, end: int, *, upper: bool) -> torch.Tensor:
    """Codes begin … end − 1 as indices; upper: whether the upper half of a byte comes first."""
    import torch

    stored = files.open(codes.source).read_part(codes.name, begin // 2, -(-end // 2))
    stored = stored.view(torch.uint8)
    low, high = stored & 0xF, stored >> 4
    both = torch.stack((high, low) if upper else (low, high), -1).reshape(-1)
    return both[begin % 2 : begin % 2 + end - begin].long()


# --- MXFP4 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MxWeight(Quantised):
    """A weight in MXFP4."""

    def numbers(self, files: Files, begin: int, end: int) -> torch.Tensor:
        return _e2m1()[_halves(files, self.codes, begin, end, upper=False)]

    def spacings(self, files: Files, begin: int, end: int) -> torch.Tensor:
        return cells(_e2m1())[_halves(files, self.codes, begin, end, upper=False)]

    def scales(self, files: Files) -> torch.Tensor:
        return power_scales(files.open(self.scale.source).read(self.scale.name, None))


def _e2m1() -> torch.Tensor:
    import torch

    return torch.tensor([*_E2M1, *(-number for number in _E2M1)], dtype=torch.float32)


def mx_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, Quantised]:
    """Name of a weight in MXFP4 → how it is read."""
    weights: dict[str, Quantised] = {}
    for codes in tensors.values():
        name, scale = _scale_of(codes, tensors)
        if scale is None or codes.dtype not in _BYTES or scale.dtype not in _POWERS:
            continue
        is_blocks = codes.name.endswith("_blocks")
        *lead, runs, half = codes.shape if is_blocks else (*codes.shape, MX_BLOCK // 2)
        if is_blocks:
            fits = (*lead, runs) == scale.shape and half == MX_BLOCK // 2
        else:
            runs, fits = runs // half, (*lead, runs // half) == scale.shape and runs % half == 0
        if fits and len(lead) == (2 if is_blocks else 1):
            weights[name] = _mx_weight(name, codes, scale, (*lead, runs * MX_BLOCK))
    return weights


def _scale_of(
    codes: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> tuple[str, TensorInfo | None]:
    """The name of the weight of these codes, and their scales."""
    for ending, scales, weight in (
        ("_blocks", "_scales", ""),
        (".weight_packed", ".weight_scale", ".weight"),
        (".weight", ".scale", ".weight"),
    ):
        if codes.name.endswith(ending):
            stem = codes.name.removesuffix(ending)
            return stem + weight, tensors.get(stem + scales)
    return codes.name, None


def _mx_weight(
    name: str, codes: TensorInfo, scale: TensorInfo, stored: tuple[int, ...]
) -> MxWeight:
    turned = len(stored) == 3
    *lead, rows, columns = stored
    shape = (*lead, columns, rows) if turned else stored
    info = TensorInfo(name, shape, "mxfp4", codes.nbytes, codes.source)
    return MxWeight(
        info, codes, scale, ScaleLayout(rows, columns, (1, MX_BLOCK)), _MXFP4, turned=turned
    )


# --- bitsandbytes ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BnbWeight(Quantised):
    """A weight in bitsandbytes' NF4 or FP4; scale is absmax.

    quant_map: the sixteen numbers. state: the JSON. nested: nested_absmax, nested_quant_map, and
    (block size, offset); None where absmax is stored as it is.
    """

    quant_map: TensorInfo
    state: TensorInfo
    nested: tuple[TensorInfo, TensorInfo, int, float] | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        nested = () if self.nested is None else self.nested[:2]
        return self.codes, self.scale, self.quant_map, self.state, *nested

    def numbers(self, files: Files, begin: int, end: int) -> torch.Tensor:
        return self._map(files)[_halves(files, self.codes, begin, end, upper=True)]

    def spacings(self, files: Files, begin: int, end: int) -> torch.Tensor:
        return cells(self._map(files))[_halves(files, self.codes, begin, end, upper=True)]

    def scales(self, files: Files) -> torch.Tensor:
        stored = _whole(files, self.scale)
        if self.nested is None:
            return stored.float()
        absmax, numbers, width, offset = self.nested
        layout = ScaleLayout(1, -(-len(stored) // width) * width, (1, width))
        codes = _whole(files, numbers).float()[stored.long()]
        return scaled(codes, 0, _whole(files, absmax).float(), layout).add_(offset)

    def _map(self, files: Files) -> torch.Tensor:
        return _whole(files, self.quant_map).float()


def _whole(files: Files, info: TensorInfo) -> torch.Tensor:
    return files.open(info.source).read(info.name, None).reshape(-1)


_LONGEST_STATE = 1 << 16
_STATE = ".quant_state.bitsandbytes__"


def bnb_states(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str, TensorInfo]]:
    """(weight, "nf4" or "fp4", the tensor with its JSON) of every weight of bitsandbytes."""
    for info in tensors.values():
        weight, state, kind = info.name.partition(_STATE)
        is_text = info.dtype == "uint8" and info.nbytes <= _LONGEST_STATE
        if state and kind in _BNB and weight in tensors and is_text:
            yield weight, kind, info


def bnb_weight(
    name: str, kind: str, state: TensorInfo, text: bytes, tensors: Mapping[str, TensorInfo]
) -> BnbWeight | None:
    """How a weight is read; None where its tensors do not fit its JSON."""
    facts = _facts(text)
    needed = [tensors.get(f"{name}.{leaf}") for leaf in ("absmax", "quant_map")]
    if facts is None or None in needed:
        return None
    scale, quant_map = (info for info in needed if info is not None)
    shape, width = tuple(facts["shape"]), facts["blocksize"]
    codes, count = tensors[name], math.prod(shape)
    runs = -(-count // width)
    nested = _nested(name, facts, tensors)
    has_nested = f"{name}.nested_absmax" in tensors
    fits = codes.nbytes == -(-count // 2) and math.prod(scale.shape) == runs
    if not fits or quant_map.shape != (16,) or has_nested != (nested is not None):
        return None
    info = TensorInfo(name, shape, kind, codes.nbytes, codes.source)
    layout = ScaleLayout(1, runs * width, (1, width))
    return BnbWeight(
        info, codes, scale, layout, _BNB[kind], quant_map=quant_map, state=state, nested=nested
    )


def _facts(text: bytes) -> dict[str, Any] | None:
    try:
        facts = parsed(text.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(facts, dict) or not isinstance(facts.get("shape"), list):
        return None
    counts = [*facts["shape"], facts.get("blocksize")]
    return facts if all(COUNT.holds(count) and count > 0 for count in counts) else None


def _nested(
    name: str, facts: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[TensorInfo, TensorInfo, int, float] | None:
    absmax, numbers = (
        tensors.get(f"{name}.{leaf}") for leaf in ("nested_absmax", "nested_quant_map")
    )
    width, offset = facts.get("nested_blocksize"), facts.get("nested_offset")
    if absmax is None or numbers is None or not COUNT.holds(width) or not width:
        return None
    if not isinstance(offset, (int, float)) or numbers.shape != (256,):
        return None
    return absmax, numbers, int(width), float(offset)
