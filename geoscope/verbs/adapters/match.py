"""Which base weights do the modules of an adapter adapt, and which does each side lack?

By the path of the module in the live model. A stack of experts adapts a 3-D tensor, or the experts'
own matrices where files keep them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from geoscope.adapters.peft_names import dropped_names
from geoscope.models.checkpoint import Checkpoint
from geoscope.names import NameMap, in_natural_order
from geoscope.peft.adapter import Adapter
from geoscope.peft.lora import expert_parts, is_targeted
from geoscope.peft.module import AdapterModule
from geoscope.peft.packing import Sides, is_packed_straight
from geoscope.records import Rename
from geoscope.verbs.adapters.names import base_paths, named_as_base

__all__ = ["AdapterMatch", "Piece"]


@dataclass(frozen=True)
class Piece:
    """A base weight, or one of its experts, and the rows of a module's product that adapt it."""

    module: AdapterModule
    name: str
    expert: int = 0
    rows: slice = field(default_factory=lambda: slice(None))
    inside: int | None = None  # which matrix of a 3-D tensor
    is_turned: bool = False  # whether that lies there (in, out)

    def of(self, tensor: Tensor) -> Tensor:
        matrix = tensor if self.inside is None else tensor[self.inside]
        return matrix.T if self.is_turned else matrix


@dataclass(frozen=True)
class AdapterMatch:
    """adapter, under the names of the base, and which base weights its modules adapt.

    renamed: what it calls otherwise. tied: modules whose weight is a copy of another one.
    pieces: of the modules whose shape fits. adapted: names of the base weights of all modules.
    unmatched: modules that are none of the base's; lacking: modules of the base that PEFT would
    adapt and that have no factors; untargeted: modules that `target_modules` does not name;
    misshapen: module → (its shape, that of the weight). oddly_packed: stacks of experts whose
    factors are not packed as PEFT from 0.19 on packs them.
    """

    adapter: Adapter
    renamed: tuple[Rename, ...]
    tied: tuple[str, ...]
    pieces: tuple[Piece, ...]
    adapted: frozenset[str]
    unmatched: tuple[str, ...]
    lacking: tuple[str, ...]
    untargeted: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    oddly_packed: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint, paths: Mapping[str, str]) -> AdapterMatch:
        dropped = set(dropped_names(list(base.tensors), base.config))
        by_path = {
            paths[name]: name
            for name, info in base.tensors.items()
            if len(info.shape) in (2, 3) and name not in dropped
        }
        known = base_paths(base)
        adapter, renamed = named_as_base(adapter, known, NameMap())
        adapter = adapter.with_base(known.every, base.config)
        tied = {path: base.tied_to[info.name] for path, info in known.tied.items()}
        found = {
            name: _pieces(
                one, {**tied, **by_path}, base, adapter.sides_of(name, known.stored, base.config)
            )
            for name, one in adapter.modules.items()
        }
        misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        pieces: list[Piece] = []
        for name, parts in found.items():
            wrong = _misfit(adapter.modules[name], parts, base)
            if wrong is None:
                pieces += parts
            else:
                misshapen[name] = wrong
        matrices = {path for path, name in by_path.items() if len(base.tensors[name].shape) == 2}
        return cls(
            adapter,
            renamed,
            tuple(name for name in adapter.modules if name in tied),
            tuple(pieces),
            frozenset(piece.name for parts in found.values() for piece in parts),
            tuple(name for name, parts in found.items() if not parts),
            tuple(in_natural_order(_expected(adapter, matrices) - set(adapter.modules))),
            tuple(
                name
                for name, one in adapter.modules.items()
                if found[name] and not one.is_stack and not _is_named(adapter, name)
            ),
            misshapen,
            tuple(
                name
                for name, parts in found.items()
                if parts and _is_oddly_packed(adapter.modules[name], parts[0], base)
            ),
        )


def _is_oddly_packed(module: AdapterModule, piece: Piece, base: Checkpoint) -> bool:
    straight = is_packed_straight(base.config, is_turned=piece.is_turned)
    return module.is_stack and module.is_turned is straight


def _pieces(
    module: AdapterModule, by_path: Mapping[str, str], base: Checkpoint, sides: Sides | None
) -> tuple[Piece, ...]:
    """The weights of one module; () where the base has none of that path."""
    if module.name in by_path:
        name = by_path[module.name]
        if not module.is_stack:
            return (Piece(module, name),)
        experts = min(module.experts, base.tensors[name].shape[0])
        is_turned = sides is not None and sides.is_turned
        return tuple(Piece(module, name, e, inside=e, is_turned=is_turned) for e in range(experts))
    parts = expert_parts(module, by_path)
    return tuple(
        Piece(module, by_path[path], e, _share(module, k, len(row)))
        for e, row in enumerate(parts)
        for k, path in enumerate(row)
    )


def _share(module: AdapterModule, k: int, count: int) -> slice:
    """The k-th of `count` equal parts of the rows."""
    rows = module.shape[0] // count
    return slice(k * rows, (k + 1) * rows)


def _misfit(
    module: AdapterModule, parts: Iterable[Piece], base: Checkpoint
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shapes of the product and of the weight, where they differ."""
    for piece in parts:
        shape = base.tensors[piece.name].shape
        matrix = shape[:-3:-1] if piece.is_turned else shape[-2:]
        rows = range(module.shape[0])[piece.rows]
        if (len(rows), module.shape[1]) != matrix:
            return module.shape, shape
        if piece.inside is not None and module.experts != shape[0]:
            return (module.experts, *module.shape), shape
    return None


def _is_named(adapter: Adapter, module: str) -> bool:
    targets = adapter.config.get("target_modules")
    return targets == "all-linear" or is_targeted(adapter.config, module)


def _expected(adapter: Adapter, matrices: set[str]) -> set[str]:
    """Modules of the base that PEFT would adapt, with factors or without.

    "all-linear" stands for modules of the kinds that are adapted.
    """
    if adapter.config.get("target_modules") != "all-linear":
        return {path for path in matrices if is_targeted(adapter.config, path)}
    leaves = {name.rpartition(".")[2] for name in adapter.modules}
    return {path for path in matrices if path.rpartition(".")[2] in leaves}
