"""How do the parts that the ranks hold make one tensor? From what each DTensor says of its place.

Every rank must tell the same story: shape, dtype, mesh, placements. The parts of one replica are
laid out along the split dimension in the order of the mesh; they must add up to the global shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, first_names
from geoscope.formats.config_rows import expected_rows
from geoscope.formats.pieces import Piece, Pieced, flaw
from geoscope.formats.refused import odd_shards, refusal

if TYPE_CHECKING:
    import torch

__all__ = ["joined"]

_TENSOR_PARALLEL = ("tp", "tensor", "tensor_parallel")


@dataclass(frozen=True)
class _Spec:
    """What a DTensor says: the dimension it is split along, None if repeated on all ranks.

    order: the ranks of one replica, in the order of their parts.
    """

    shape: tuple[int, ...]
    dtype: str
    dim: int | None
    order: tuple[int, ...]


def joined(
    ranks: Sequence[Mapping[str, torch.Tensor]], config: Mapping[str, Any], label: str
) -> dict[str, Pieced[int]]:
    """The whole tensors, each with the pieces of the ranks, sorted by name.

    ranks: the tensors of each rank. config: config.json. Raises CheckpointError.
    """
    names = set(ranks[0])
    for rank, tensors in enumerate(ranks):
        if set(tensors) != names:
            odd = sorted(names ^ set(tensors))
            raise CheckpointError(
                f"`{label}`: rank 0 and rank {rank} hold different tensors ({first_names(odd)}); "
                "the files are of different saves: copy them again"
            )
    return {
        name: _joined(name, [tensors[name] for tensors in ranks], config, label)
        for name in sorted(names)
    }


def _joined(
    name: str, values: Sequence[torch.Tensor], config: Mapping[str, Any], label: str
) -> Pieced[int]:
    locals_ = [getattr(value, "_local_tensor", value) for value in values]
    for rank, local in enumerate(locals_):
        if local.numel() * local.element_size() > local.untyped_storage().nbytes():
            raise _damaged(label, name, f"rank {rank} claims more entries than its file holds")
    sharded = [hasattr(value, "_spec") for value in values]
    if not any(sharded):
        return _plain(name, locals_, config, label)
    if not all(sharded):
        raise _damaged(label, name, "it is a DTensor on some ranks and a plain tensor on others")
    specs = [_checked_spec(name, value, len(values), label) for value in values]
    if any(spec != specs[0] for spec in specs):
        raise _damaged(label, name, "the ranks differ in its shape, dtype or mesh")
    spec = specs[0]
    if any(rank not in range(len(values)) for rank in spec.order):
        raise _damaged(label, name, f"its mesh has ranks beyond the {len(values)} files")
    if any(_dtype(local) != spec.dtype for local in locals_):
        raise _damaged(label, name, "its parts are of another dtype than it says")
    return _laid_out(name, spec, locals_, label)


def _laid_out(name: str, spec: _Spec, locals_: Sequence[torch.Tensor], label: str) -> Pieced[int]:
    """The parts of one replica, one behind the other."""
    dim, shape = spec.dim or 0, spec.shape or (1,)
    pieces: list[Piece[int]] = []
    begin = 0
    for rank in spec.order:
        sizes = tuple(locals_[rank].shape) or (1,)
        if not math.prod(sizes):
            continue
        if len(sizes) != len(shape):
            raise _damaged(label, name, f"rank {rank} holds {list(sizes)} of {list(shape)}")
        offsets = [0] * len(shape)
        offsets[dim] = begin
        pieces.append(Piece(tuple(offsets), sizes, rank))
        begin += sizes[dim]
    wrong = flaw(spec.shape, pieces)
    if wrong is not None:
        raise _damaged(label, name, wrong)
    return Pieced(spec.shape, spec.dtype, tuple(pieces))


def _checked_spec(name: str, value: Any, world: int, label: str) -> _Spec:
    try:
        placements = tuple(value._spec.placements)
        ranks, names = _mesh(value._spec.mesh)
        too_many = ranks.numel() > world
    except Exception:  # whatever a file may hold in the place of a mesh
        raise _damaged(label, name, "its mesh cannot be read") from None
    if too_many:
        raise _damaged(label, name, f"its mesh has more ranks than the {world} files")
    return _spec(name, tuple(value.shape), _dtype(value), placements, ranks, names, label)


def _spec(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    placements: tuple[Any, ...],
    ranks: torch.Tensor,
    names: tuple[str, ...],
    label: str,
) -> _Spec:
    kinds = [type(placement).__name__ for placement in placements]
    evidence = f"{name} is {', '.join(kinds)} on a mesh of {names}"
    splits = [i for i, kind in enumerate(kinds) if kind == "Shard"]
    parallel = any(
        str(one) in _TENSOR_PARALLEL and size > 1
        for one, size in zip(names, ranks.shape, strict=False)
    )
    if parallel or len(splits) > 1 or not set(kinds) <= {"Shard", "Replicate"}:
        raise refusal(label, odd_shards(evidence))
    if len(placements) != ranks.dim():
        raise _damaged(label, name, f"{len(placements)} placements on {ranks.dim()} dimensions")
    split = splits[0] if splits else None
    order = tuple(
        int(ranks[place])
        for place in product(
            *(range(size if axis == split else 1) for axis, size in enumerate(ranks.shape))
        )
    )
    dim = None if split is None else placements[split].dim % max(1, len(shape))
    return _Spec(shape, dtype, dim, order)


def _mesh(mesh: Any) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The ranks of a mesh, and the names of its dimensions.

    Older versions of torch kept them as attributes of these names, which are properties now.
    """
    state = vars(mesh)
    ranks = state["mesh"] if "mesh" in state else mesh.mesh
    names = state["mesh_dim_names"] if "mesh_dim_names" in state else mesh.mesh_dim_names
    return ranks, tuple(names or ())


def _plain(
    name: str, locals_: Sequence[torch.Tensor], config: Mapping[str, Any], label: str
) -> Pieced[int]:
    """Tensors without a mesh: repeated on all ranks, or parts of the rows."""
    import torch

    first = locals_[0]
    rows = sum(one.shape[0] for one in locals_) if first.dim() else 0
    equal = all(
        one.shape == first.shape and one.dtype == first.dtype and torch.equal(one, first)
        for one in locals_[1:]
    )
    expected = expected_rows(name, config)
    if equal and (len(locals_) == 1 or not first.dim() or expected in (None, first.shape[0])):
        order: tuple[int, ...] = (0,)
        shape = tuple(first.shape)
    elif rows and rows == expected:
        order, shape = tuple(range(len(locals_))), (rows, *first.shape[1:])
    else:
        asked = "config.json does not tell its rows" if expected is None else f"needs {expected}"
        raise CheckpointError(
            f"`{label}`: {name} is a plain tensor with different content on each rank ({rows} rows "
            f"in total; {asked}), so it cannot be joined. Save the shards with a device mesh, as "
            "FSDP2 does"
        )
    if any(one.dtype != first.dtype for one in locals_):
        raise _damaged(label, name, "the ranks differ in its dtype")
    return _laid_out(name, _Spec(shape, _dtype(first), 0, order), locals_, label)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _damaged(label: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"`{label}`: the shards of {name} do not fit together: {reason}; copy them again"
    )
