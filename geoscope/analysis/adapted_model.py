"""An adapter over a base: which tensors of the base it changes, and from where it started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from geoscope.adapters.peft_names import module_paths
from geoscope.checkpoints import Checkpoint
from geoscope.checkpoints.peft.adapted import AdaptedCheckpoint, Change
from geoscope.checkpoints.peft.adapter import Adapter, open_adapter
from geoscope.checkpoints.peft.folder import adapter_folder, record_beside
from geoscope.checkpoints.peft.lora import expert_parts
from geoscope.checkpoints.peft.module import AdapterModule
from geoscope.checkpoints.views import Blocks
from geoscope.errors import OptionError, PairingError, first_names
from geoscope.records import Skipped, TensorInfo

__all__ = ["adapted", "stacks_of_update", "started_from", "update_of"]


def started_from(
    adapter: Adapter, given: str | None, *, alpha: float | None = None
) -> Adapter | None:
    """The adapter before training, where the product was not zero then.

    given: `--initial-adapter`. Without it, that of a base which `init-adapter` rewrote is found
    beside this base. alpha: `--lora-alpha`. Raises OptionError where the update cannot be told
    without it.
    """
    if given is not None:
        return open_adapter(given, alpha=alpha)
    if adapter.initial is None:
        return None
    base = adapter.base_folder
    if base is not None and record_beside(str(base)).get("layout") == "residual":
        beside = base.parent / "adapter"
        if beside.is_dir() and adapter_folder(beside).layout == "residual":
            return open_adapter(beside)
    raise OptionError(
        f"{adapter.given}: {adapter.initial}, so its update is not s·B·A; give the adapter before "
        "training as `initial_adapter`"
    )


def update_of(base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[Tensor, ...]:
    """What `FactorUpdate.of` takes where `tuned` is an adapter over `base`; else the weight."""
    if not isinstance(tuned, AdaptedCheckpoint) or stacks_of_update(base, tuned, name) == 1:
        return (tuned.read(name),)
    factors = tuned.factors(name)
    return tuple(
        one for B, A, s in factors for one in (B, A, torch.tensor([s], dtype=torch.float64))
    )


def stacks_of_update(base: Checkpoint, tuned: Checkpoint, name: str) -> int:
    """How many tensors `update_of` gives, without reading them."""
    if not isinstance(tuned, AdaptedCheckpoint) or tuned.base is not base:
        return 1
    change = tuned.changes.get(name)
    if change is None or not change.has_factors:
        return 1
    return 3 if tuned.start is None else 6


def adapted(
    base: Checkpoint, whole: Checkpoint, adapter: Adapter, start: Adapter | None
) -> AdaptedCheckpoint:
    """The base with the adapter over it.

    whole: the base as stored; base: the same, or in parts (`split`). Raises PairingError where the
    adapter belongs to another model.
    """
    live = module_paths(list(whole.tensors), whole.config).paths
    infos = {path: whole.tensors[name] for name, path in live.items()}
    adapter = adapter.with_base(infos)
    changes, uncompared = _changes(adapter, infos, whole.tied_to)
    if start is not None:
        _check_start(adapter, start)
    parts: dict[str, Change] = {}
    tensors = dict(base.tensors)
    for name, info in base.tensors.items():
        view = base.views.get(name)
        change = changes.get(name if view is None else view.stored)
        if change is None:
            continue
        if view is not None:  # the blocks of a view are outputs, however it lies
            change = replace(change, rows=view.blocks, expert=max(view.matrix, change.expert))
        parts[name] = change
        tensors[name] = _changed_info(info, change, adapter)
    return AdaptedCheckpoint(
        ref=adapter.ref,
        config=base.config,
        tensors=tensors,
        notes=_notes_of(base, start),
        # what is changed is no copy any more
        tied_to={name: kept for name, kept in base.tied_to.items() if name not in parts},
        source=base.source,
        views=base.views,
        scales=base.scales,
        base=base,
        whole=whole,
        adapter=adapter,
        changes=parts,
        start=start,
        is_doubled=adapter_folder(adapter.path).layout == "mirror",
        uncompared=uncompared,
    )


def _check_start(adapter: Adapter, start: Adapter) -> None:
    """Raises OptionError for a start that cannot be taken off this adapter."""
    for name, module in adapter.modules.items():
        if module.kind == "base":
            raise OptionError(
                f"{adapter.given}: {module.called} with a start that is not zero is not read; "
                "merge it into its base (PeftModel.merge_and_unload) and give the merged folder"
            )
        other = start.modules.get(name)
        if other is None or other.shape != module.shape or other.experts != module.experts:
            raise OptionError(
                f"{start.given}: {name} is not adapted there, or in another shape; give the "
                f"adapter that {adapter.given} began as"
            )


def _notes_of(base: Checkpoint, start: Adapter | None) -> tuple[str, ...]:
    """What is taken off the adapter, and what it lies over, where that is not obvious."""
    notes = () if start is None else (f"the start {start.given} is taken off",)
    if isinstance(base, AdaptedCheckpoint):
        notes += (
            f"lies over {base.ref.given}, the adapter of which stays in; to compare two adapters "
            "of one model give MODEL+ADAPTER twice",
        )
    return notes


def _changes(
    adapter: Adapter, infos: Mapping[str, TensorInfo], tied: Mapping[str, str]
) -> tuple[dict[str, Change], tuple[Skipped, ...]]:
    """Stored name of the base → how it is changed; and what the base has no counterpart of.

    infos: live path → base tensor. tied: name → the tensor that it repeats.
    """
    changes: dict[str, Change] = {}
    lacking: list[str] = []
    uncompared: list[Skipped] = []
    for name, module in adapter.modules.items():
        found = _of_module(name, module, adapter, infos)
        if found is not None:
            changes |= found
        elif (kept := tied.get(f"{name}.weight")) is not None:
            reason = f"adapted, and the base stores it as {kept} alone"
            uncompared.append(Skipped(f"{name}.weight", reason, missing=True))
        else:
            lacking.append(name)
    if lacking:
        raise PairingError(
            f"{adapter.given}: the base lacks {len(lacking)} of {len(adapter.modules)} adapted "
            f"modules: {first_names(lacking)}; give the model that it was trained on"
        )
    for key in (*adapter.replaced, *adapter.rows, *adapter.vectors):
        info = infos.get(key.removesuffix(".weight"))
        if info is None:
            if key in adapter.vectors and adapter.vectors[key].multiplies:
                continue  # IA3 scales a bias where there is one
            stored = adapter.replaced.get(key)
            is_vector = stored is None or len(adapter.tensors[stored].shape) < 2
            reason = "replaced by the adapter, without a counterpart in the base"
            uncompared.append(Skipped(key, reason, missing=not is_vector))
        elif info.name not in changes:
            changes[info.name] = Change(key, replaced=adapter.replaced.get(key))
    return changes, tuple(uncompared)


def _of_module(
    name: str, module: AdapterModule, adapter: Adapter, infos: Mapping[str, TensorInfo]
) -> dict[str, Change] | None:
    """The tensors of one module; None where the base has no such, or in another shape."""
    info = infos.get(name)
    if info is not None:
        replaced = adapter.replaced.get(f"{name}.weight")
        turned = (*info.shape[:-2], *info.shape[:-3:-1])
        fits = module.fits(info.shape) or (module.is_stack and module.fits(turned))
        if replaced is None and not fits:
            raise PairingError(
                f"{adapter.given}: {name} is adapted as {module.shape}, and {info.shape} in the "
                "base; give the model that it was trained on"
            )
        return {info.name: Change(name, module, replaced)}
    found: dict[str, Change] = {}
    for expert, paths in enumerate(expert_parts(module, infos)):
        top = 0
        for path in paths:
            one = infos[path]
            found[one.name] = Change(name, module, expert=expert, rows=Blocks(top, one.shape[0]))
            top += one.shape[0]
    return found or None


def _changed_info(info: TensorInfo, change: Change, adapter: Adapter) -> TensorInfo:
    """The header of the tuned tensor: the dtype of what changes it, and its rows."""
    if change.replaced is not None:
        header = adapter.tensors[change.replaced]
        if change.rows is not None:  # a part of it
            return replace(info, dtype=header.dtype)
        turned = info.transposed and len(header.shape) == 2
        return replace(
            info, shape=header.shape[::-1] if turned else header.shape, dtype=header.dtype
        )
    if change.module is None:
        return info
    dtypes = {one.dtype for one in change.module.stored}
    return replace(info, dtype=dtypes.pop() if len(dtypes) == 1 else "float64")
