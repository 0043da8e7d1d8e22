"""Ranks of an adapter in training, from r × r matrices: fast enough for every save of a trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg.factor_spectra import product_spectra
from geoscope.metrics import METRICS
from geoscope.names import in_natural_order, layer_index
from geoscope.peft.adapter import Adapter

__all__ = ["IDS", "AdapterRanks", "adapter_ranks"]

# Of METRICS, those that are functions of the singular values of the update alone.
IDS = ("stable_rank", "effective_rank", "entropy_rank", "top_share@1")


@dataclass(frozen=True)
class AdapterRanks:
    """Means over the matrices, as `compare` has them of a model.

    values: `update.<id>`, with `rank`, that of the factors. layers: block → the same of its
    matrices. skipped: modules without numbers, with the reason.
    """

    values: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]
    skipped: Mapping[str, str]


def adapter_ranks(adapter: Adapter) -> AdapterRanks:
    """The ranks of every module that is a product of two factors; ΔW is never made."""
    names: list[str] = []
    factors: list[tuple[Tensor, Tensor, float]] = []
    skipped: dict[str, str] = {}
    for name, module in adapter.modules.items():
        if module.kind != "factors":
            skipped[name] = f"the update of {module.called} cannot be computed without the base"
            continue
        B, A = adapter.factors(name)
        if not (bool(torch.isfinite(B).all()) and bool(torch.isfinite(A).all())):
            skipped[name] = "its factors hold NaN or Inf"
            continue
        names += [name] * len(B)
        factors += [(B[i], A[i], module.scaling) for i in range(len(B))]
    spectra = product_spectra(factors)
    rows: dict[str, list[dict[str, float]]] = {}
    for name, S in zip(names, spectra, strict=True):
        rows.setdefault(name, []).append(_numbers(S))
    blocks: dict[str, list[dict[str, float]]] = {}
    for name, own in rows.items():
        if (layer := layer_index(f"{name}.weight")) is not None:
            blocks.setdefault(str(layer), []).extend(own)
    return AdapterRanks(
        _means([row for own in rows.values() for row in own]),
        {block: _means(blocks[block]) for block in in_natural_order(blocks)},
        skipped,
    )


def _numbers(S: Tensor) -> dict[str, float]:
    """Of one matrix; a zero update has its rank alone."""
    found = {"rank": float(len(S))}
    for key in IDS if float(S[0]) > 0 else ():
        metric = METRICS[key]
        stack, k = S[None], key.partition("@")[2]
        value = metric.fn(stack, k=int(k)) if k else metric.fn(stack)
        found[f"update.{key}"] = float(value)
    return found


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row in rows for key in row)
    known = {key: [row[key] for row in rows if key in row] for key in keys}
    return {key: math.fsum(some) / len(some) for key, some in known.items()}
