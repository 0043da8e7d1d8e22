"""What are the matrices of a model, where its files hold several of them in one tensor?

Fused q, k, v and gate, up come apart where the family is known (`fused`), stacks of experts always
(`experts`): a checkpoint with views in place of such tensors, under the names that they have in a
model that stores them one by one. It is for comparing: what writes models keeps the stored tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from geoscope.formats.views import Blocks, View
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.experts import expert_parts
from geoscope.models.fused import FUSED, fused_parts
from geoscope.names import layer_index
from geoscope.records import TensorInfo

__all__ = ["common_config", "narrowed", "split"]


@dataclass(frozen=True)
class _Part:
    """A new tensor and where it lies."""

    info: TensorInfo
    view: View


def common_config(*checkpoints: Checkpoint) -> Mapping[str, Any]:
    """The first config.json that names a family: for a pair of which one side has none."""
    return next(
        (checkpoint.config for checkpoint in checkpoints if checkpoint.config.get("model_type")), {}
    )


def split(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint with fused and stacked tensors in parts.

    config: that of the same model from elsewhere, for a checkpoint that has none.
    """
    config = checkpoint.config if checkpoint.config.get("model_type") else config or {}
    tensors: dict[str, TensorInfo] = {}
    views: dict[str, View] = dict(checkpoint.views)
    told: Counter[tuple[str, str]] = Counter()
    for name, info in checkpoint.tensors.items():
        leaf, parts = ("", []) if name in views else _parts(info, checkpoint, config)
        names = [part.info.name for part in parts]
        if not parts or any(one in checkpoint.tensors for one in names):
            tensors[name] = info
            if _stays_fused(info):
                told[_leaf(info), ""] += 1
            continue
        tensors |= {part.info.name: part.info for part in parts}
        views |= {part.info.name: part.view for part in parts}
        if leaf and len(info.shape) == 2:
            told[leaf, ", ".join(_leaf(part.info) for part in parts)] += 1
    notes = _notes(told, config.get("model_type"))
    return replace(
        checkpoint,
        tensors=dict(sorted(tensors.items())),
        views=views,
        notes=(*checkpoint.notes, *notes),
    )


def narrowed(checkpoint: Checkpoint, name: str, rows: int) -> Checkpoint:
    """The checkpoint with only the first `rows` (outputs) of one tensor."""
    info = checkpoint.tensors[name]
    if (view := checkpoint.views.get(name)) is not None and view.axis == 0:
        whole, size = info.shape[0], info.nbytes // max(1, info.shape[0])
        cut = replace(view, blocks=replace(view.blocks, count=min(rows, whole)))
        shorter = replace(info, shape=(cut.blocks.total, *info.shape[1:]), nbytes=size * rows)
        return replace(
            checkpoint,
            tensors={**checkpoint.tensors, name: shorter},
            views={**checkpoint.views, name: cut},
        )
    part = _part(info, name, Blocks(0, rows), axis=1 if info.transposed else 0)
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, name: part.info},
        views={**checkpoint.views, name: part.view},
    )


def _parts(
    info: TensorInfo, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> tuple[str, list[_Part]]:
    """The fused module's name, or "" for experts, and the parts; none for a tensor as it is."""
    experts = expert_parts(info, checkpoint.tensors, config)
    if experts:
        return "", [
            _part(info, expert.name, expert.blocks, axis=int(expert.turned), matrix=expert.number)
            for expert in experts
        ]
    fused = fused_parts(info, config)
    if fused is None:
        return "", []
    leaf, parts = fused
    head, tail = info.name.rsplit(f"{leaf}.", 1)
    axis = 1 if info.transposed else 0
    return leaf, [
        _part(info, f"{head}{module}.{tail}", blocks, axis=axis) for module, blocks in parts.items()
    ]


def _part(info: TensorInfo, name: str, blocks: Blocks, *, axis: int, matrix: int = 0) -> _Part:
    """One part of a stored tensor: its header and its view.

    A stack (E, R, C) holds matrices; so does (E, C), the biases of experts, of one row each.
    """
    stored = info.shape[::-1] if info.transposed else info.shape
    is_vector = len(stored) == 1 or (len(stored) == 2 and name.endswith("bias"))
    if len(stored) == 1:
        rows, columns = stored[0], 1
    else:
        rows, columns = (1 if is_vector else stored[-2]), stored[-1]
    view = View(info.name, rows, columns, blocks, axis, matrix)
    turned = axis == 1 and not is_vector
    shape = (blocks.total,) if is_vector else view.shape[::-1] if turned else view.shape
    size = info.nbytes * math.prod(shape) // max(1, math.prod(info.shape))
    return _Part(TensorInfo(name, shape, info.dtype, size, info.source, turned), view)


def _stays_fused(info: TensorInfo) -> bool:
    return (
        len(info.shape) == 2
        and layer_index(info.name) is not None
        and FUSED.search(info.name) is not None
    )


def _leaf(info: TensorInfo) -> str:
    return info.name.split(".")[-2]


def _notes(told: Mapping[tuple[str, str], int], family: str | None) -> tuple[str, ...]:
    whole = sorted(leaf for leaf, parts in told if not parts)
    notes = [f"{leaf} is compared as {parts}" for leaf, parts in sorted(told) if parts]
    if whole:
        known = f"of {family} " if family else "without a config.json "
        notes.append(
            f"{', '.join(whole)}: fused, and {known}it is not known how; each is one matrix"
        )
    return tuple(notes)
