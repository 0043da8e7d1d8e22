"""How does an adapter change each tensor of a base, in the parts that are compared?

a module of the base                 the tensor, or every part that it is compared in
stacked experts, files apart         each expert's own matrices, rows one below the other
a part of a fused or stacked tensor  that part: q_proj over qkv_proj, gate_up_projs.3 of a stack
a fused module, files apart          its parts, rows one below the other: qkv_proj over q, k, v
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from geoscope.errors import PairingError, first_names
from geoscope.formats.views import Blocks
from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapted import Change
from geoscope.peft.adapter import Adapter
from geoscope.peft.lora import expert_parts
from geoscope.peft.module import AdapterModule
from geoscope.records import TensorInfo
from geoscope.verbs.adapters.names import BasePaths

__all__ = ["Changes", "changes_of"]

# A fused module → its parts from top to bottom, where the base stores these by themselves.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# A module for each expert of a stack, as bitsandbytes builds of gpt-oss have them.
_UNSTACKED = re.compile(r"(?P<stack>.*\.experts\.(?:gate_up_proj|down_proj))s\.(?P<expert>\d+)")


@dataclass(frozen=True)
class Changes:
    """by_name: part of the base → how it is changed. lacking: tensors that the adapter replaces and
    the base has not, with the reason. notes: what was taken apart or together."""

    by_name: dict[str, Change]
    lacking: tuple[tuple[TensorInfo, str], ...]
    notes: tuple[str, ...]


def changes_of(adapter: Adapter, paths: BasePaths, base: Checkpoint) -> Changes:
    """The changes of a base in parts, or as stored.

    adapter: under the names of the base. Raises PairingError where it belongs to another model.
    """
    by_name: dict[str, Change] = {}
    fused: set[str] = set()
    lacking: list[str] = []
    for name, module in adapter.modules.items():
        found = _of_module(module, adapter, paths, base)
        if found is None:
            lacking.append(name)
            continue
        by_name |= found
        leaf = name.rpartition(".")[2]
        if name not in paths.stored and leaf in _FUSED and not module.is_stack:
            fused.add(leaf)
    if lacking:
        raise PairingError(_lacks(adapter, lacking))
    whole = _replaced(adapter, paths, base, by_name)
    notes = tuple(
        f"{leaf} of the adapter is compared as {', '.join(_FUSED[leaf])}, its rows in this order"
        for leaf in sorted(fused)
    )
    return Changes(by_name, whole, notes)


def _lacks(adapter: Adapter, lacking: list[str]) -> str:
    return (
        f"{adapter.given}: the base lacks {len(lacking)} of {len(adapter.modules)} adapted "
        f"modules: {first_names(lacking)}; give the model that it was trained on, or `map_name` "
        "where it has other names for them"
    )


def _of_module(
    module: AdapterModule, adapter: Adapter, paths: BasePaths, base: Checkpoint
) -> dict[str, Change] | None:
    """The tensors of one module; None where the base has no such."""
    name = module.name
    if (info := paths.stored.get(name)) is not None:
        change = Change(name, module, adapter.replaced.get(f"{name}.weight"))
        _check_shape(adapter, module, info, paths, base)
        return dict(_in_parts(info.name, change, base))
    if (info := paths.parts.get(name, paths.tied.get(name))) is not None:
        change = Change(name, module, adapter.replaced.get(f"{name}.weight"), is_part=True)
        _check_shape(adapter, module, info, paths, base)
        return {info.name: change}
    if (match := _UNSTACKED.fullmatch(name)) and (info := paths.stored.get(match["stack"])):
        return dict(_of_expert(module, int(match["expert"]), info, base))
    return _rows(module, paths, adapter) or None


def _in_parts(stored: str, change: Change, base: Checkpoint) -> Iterator[tuple[str, Change]]:
    """A change of a stored tensor as that of the parts of it. The blocks of a view are outputs,
    however it lies."""
    if stored in base.tensors and stored not in base.views:
        yield stored, change
    for name, view in base.views.items():
        if view.stored == stored and name in base.tensors:
            yield name, replace(change, rows=view.blocks, expert=max(view.matrix, change.expert))


def _of_expert(
    module: AdapterModule, expert: int, info: TensorInfo, base: Checkpoint
) -> Iterator[tuple[str, Change]]:
    """Parts of one matrix of a stack, which the adapter has as a module by itself."""
    for name, view in base.views.items():
        if view.stored == info.name and view.matrix == expert:
            yield name, Change(module.name, module, rows=view.blocks)


def _rows(module: AdapterModule, paths: BasePaths, adapter: Adapter) -> dict[str, Change]:
    """Tensors of the base that are the module's rows, one below the other."""
    found: dict[str, Change] = {}
    for expert, parts in enumerate(_parts(module, paths.stored)):
        rows = [paths.stored[path] for path in parts]
        sides = sum(row.shape[0] for row in rows), rows[0].shape[1]
        if sides != module.shape:
            raise _misfit(adapter, module, sides)
        top = 0
        for one in rows:
            blocks = Blocks(top, one.shape[0])
            found[one.name] = Change(module.name, module, expert=expert, rows=blocks)
            top += one.shape[0]
    return found


def _parts(module: AdapterModule, stored: Mapping[str, TensorInfo]) -> tuple[tuple[str, ...], ...]:
    if module.is_stack:
        return expert_parts(module, stored)
    above, _, leaf = module.name.rpartition(".")
    parts = tuple(f"{above}.{one}" for one in _FUSED.get(leaf, ()))
    return (parts,) if parts and all(part in stored for part in parts) else ()


def _check_shape(
    adapter: Adapter, module: AdapterModule, info: TensorInfo, paths: BasePaths, base: Checkpoint
) -> None:
    """Raises PairingError for a weight that cannot be the adapted one. What is replaced may."""
    if f"{module.name}.weight" in adapter.replaced:
        return
    sides = adapter.sides_of(module.name, paths.stored, base.config)
    if sides is not None:
        fits = module.experts == info.shape[0] and module.shape == sides.shape
    else:
        turned = (*info.shape[:-2], *info.shape[:-3:-1])
        fits = module.fits(info.shape) or (module.is_stack and module.fits(turned))
    if not fits:
        raise _misfit(adapter, module, info.shape)


def _misfit(adapter: Adapter, module: AdapterModule, shape: tuple[int, ...]) -> PairingError:
    own = (module.experts, *module.shape) if module.is_stack else module.shape
    return PairingError(
        f"{adapter.given}: {module.name} is adapted as {own}, and {shape} in the base; give the "
        "model that it was trained on"
    )


def _replaced(
    adapter: Adapter, paths: BasePaths, base: Checkpoint, by_name: dict[str, Change]
) -> tuple[tuple[TensorInfo, str], ...]:
    """Enters what is replaced or changed whole into `by_name`; what the base has no place for."""
    lacking: list[tuple[TensorInfo, str]] = []
    for key in (*adapter.replaced, *adapter.rows, *adapter.vectors):
        path = key.removesuffix(".weight")
        stored = adapter.replaced.get(key)
        if (info := paths.stored.get(path)) is not None:
            for name, change in _in_parts(info.name, Change(key, replaced=stored), base):
                by_name.setdefault(name, change)
        elif (info := paths.parts.get(path, paths.tied.get(path))) is not None:
            by_name.setdefault(info.name, Change(key, replaced=stored, is_part=True))
        elif key not in adapter.vectors or not adapter.vectors[key].multiplies:
            # IA3 scales a bias where there is one
            shape = () if stored is None else adapter.tensors[stored].shape
            dtype = "float32" if stored is None else adapter.tensors[stored].dtype
            info = TensorInfo(key, shape, dtype, 0, "")
            lacking.append((info, "replaced by the adapter, without a counterpart in the base"))
    return tuple(lacking)
