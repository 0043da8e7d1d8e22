"""How do LoHa and LoKr adapters of PEFT store their updates? As products of products, s = alpha/r.

    <module>.hada_w{1,2}_a (out, r), .hada_w{1,2}_b (r, in)        ΔW = s·(w1_a·w1_b) ⊙ (w2_a·w2_b)
    <module>.lokr_w1 (a, c) or .lokr_w1_a (a, r), .lokr_w1_b (r, c)
    <module>.lokr_w2 (b, d) or .lokr_w2_a (b, r), .lokr_w2_b (r, d)    ΔW = s·(w1 ⊗ w2), (ab, cd)

Both are one product: (U·V) ⊙ (X·Y) = (U ∗ X)·(V ∗ Y) with the products of all columns (rows), of
rank r²; (U·V) ⊗ (X·Y) = (U ⊗ X)·(V ⊗ Y), where a factor that is stored whole is itself times I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.peft.config import value_of
from geoscope.peft.keys import MERGE, by_module, refuse_flat, refuse_partial
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LycorisModule", "loha_modules", "lokr_modules"]

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_KERNELS = ("hada_t1", "hada_t2", "lokr_t2")

# One of the two matrices: (left, right), or the whole of it.
_Pair = Sequence["Tensor"]
_Join = Callable[[_Pair, _Pair], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True, kw_only=True)
class LycorisModule(AdapterModule):
    """A module with LoHa or LoKr. first, second: the two matrices, as one tensor or as two factors.
    join: from them B and A."""

    first: tuple[TensorInfo, ...]
    second: tuple[TensorInfo, ...]
    join: _Join
    label: str

    @property
    def kind(self) -> Kind:
        return "factors"

    @property
    def called(self) -> str:
        return self.label

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        first, second = (
            [read(one.name).double() for one in pair] for pair in (self.first, self.second)
        )
        B, A = self.join(first, second)
        return B[None], A[None]


def loha_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, LycorisModule]:
    """Every adapted module by name. Raises CheckpointError for factors that lack their partners or
    contradict the config, UnsupportedFormat for convolutions."""
    found = by_module(tensors, (*_LOHA, *_KERNELS), label)
    _refuse_kernels(found, label)
    refuse_partial(found, _LOHA, label)
    modules: dict[str, LycorisModule] = {}
    for path, roles in found.items():
        stored = tuple(roles[one] for one in _LOHA)
        refuse_flat(stored, label)
        rank = value_of(config, "r", path, label)
        (m, _), (_, n) = stored[0].shape, stored[1].shape
        wanted = [(m, rank), (rank, n)] * 2
        if [one.shape for one in stored] != wanted:
            raise _contradiction(path, stored, rank, label)
        modules[path] = _module(
            path, config, stored[:2], stored[2:], _columns_times_columns, "LoHa", label,
            shape=(m, n), rank=int(rank) ** 2,
        )  # fmt: skip
    return modules


def lokr_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, LycorisModule]:
    """Every adapted module by name. Raises as `loha_modules`."""
    found = by_module(tensors, (*_LOKR, *_KERNELS), label)
    _refuse_kernels(found, label)
    modules: dict[str, LycorisModule] = {}
    for path, roles in found.items():
        pairs = [_kronecker_pair(roles, side, path, label) for side in ("lokr_w1", "lokr_w2")]
        stored = (*pairs[0], *pairs[1])
        refuse_flat(stored, label)
        rank = value_of(config, "r", path, label)
        inner = [pair[0].shape[1] for pair in pairs if len(pair) == 2]
        if any(one != rank for one in inner) or any(
            pair[0].shape[1] != pair[-1].shape[0] for pair in pairs if len(pair) == 2
        ):
            raise _contradiction(path, stored, rank, label)
        m, n = (pairs[0][i].shape[i] * pairs[1][i].shape[i] for i in (0, -1))
        ranks = [pair[0].shape[1] if len(pair) == 2 else min(pair[0].shape) for pair in pairs]
        modules[path] = _module(
            path, config, pairs[0], pairs[1], _kronecker, "LoKr", label,
            shape=(m, n), rank=ranks[0] * ranks[1],
        )  # fmt: skip
    return modules


def _module(
    path: str,
    config: Mapping[str, Any],
    first: tuple[TensorInfo, ...],
    second: tuple[TensorInfo, ...],
    join: _Join,
    called: str,
    label: str,
    *,
    shape: tuple[int, int],
    rank: int,
) -> LycorisModule:
    alpha = value_of(config, "alpha", path, label)
    return LycorisModule(
        name=path,
        path=path,
        shape=shape,
        rank=min(rank, *shape),
        scaling=alpha / value_of(config, "r", path, label),
        stored=(*first, *second),
        alpha=alpha,
        first=first,
        second=second,
        join=join,
        label=called,
    )


def _kronecker_pair(
    roles: Mapping[str, TensorInfo], side: str, path: str, label: str
) -> tuple[TensorInfo, ...]:
    if side in roles:
        return (roles[side],)
    refuse_partial({path: roles}, (f"{side}_a", f"{side}_b"), label)
    return roles[f"{side}_a"], roles[f"{side}_b"]


def _columns_times_columns(first: _Pair, second: _Pair) -> tuple[Tensor, Tensor]:
    """(U ∗ X, V ∗ Y) of (U, V) and (X, Y): every column times every column, every row times row."""
    (U, V), (X, Y) = first, second
    B = U[:, :, None] * X[:, None, :]
    A = V[:, None, :] * Y[None, :, :]
    return B.flatten(1), A.flatten(0, 1)


def _kronecker(first: _Pair, second: _Pair) -> tuple[Tensor, Tensor]:
    import torch

    (U, V), (X, Y) = (_split(*one) for one in (first, second))
    return torch.kron(U, X), torch.kron(V, Y)


def _split(left: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two factors; of a whole matrix itself and I, of its shorter side."""
    import torch

    if right is not None:
        return left, right
    m, n = left.shape
    eye = torch.eye(min(m, n), dtype=left.dtype)
    return (left, eye) if n <= m else (eye, left)


def _refuse_kernels(found: Mapping[str, Mapping[str, TensorInfo]], label: str) -> None:
    kernels = [path for path, roles in found.items() if not roles.keys().isdisjoint(_KERNELS)]
    if kernels:
        raise UnsupportedFormat(
            f"{label}: {len(kernels)} modules are convolutions, first {kernels[0]}; geoscope reads "
            f"adapters of linear layers and embeddings. {MERGE}"
        )


def _contradiction(
    path: str, stored: Sequence[TensorInfo], rank: float, label: str
) -> CheckpointError:
    shapes = ", ".join(f"{one.name.rpartition('.')[2]} {one.shape}" for one in stored)
    return CheckpointError(
        f"{label}: {path} has {shapes}, the config rank {rank:g}; factors and adapter_config.json "
        "are of different saves: copy both again"
    )
