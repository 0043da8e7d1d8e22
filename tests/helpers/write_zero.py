"""ZeRO checkpoints as DeepSpeed lays them out, without DeepSpeed; its classes by name alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

__all__ = ["write_zero"]


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


class ZeroStageEnum(int):
    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an Enum does."""
        return ZeroStageEnum, (int(self),)


class fragment_address:
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


_PLACES = {
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    fragment_address: "deepspeed.utils.tensor_fragment",
}


def write_zero(
    folder: Path,
    groups: Sequence[Mapping[str, Tensor]],
    *,
    stage: int,
    world: int,
    frozen: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    padded: bool = False,
    extra: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
) -> Path:
    """The files of a save. groups: fp32 masters by parameter group, in order. padded: whether the
    padding of ZeRO-2 stays. extra: more entries of the model states. without: files left out."""
    folder.mkdir(parents=True, exist_ok=True)
    frozen, buffers, shared = frozen or {}, buffers or {}, shared or {}
    split = _by_parameter if stage == 3 else _end_to_end
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(world):
        state = {
            "loss_scaler": LossScaler(),
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": world if stage == 3 else [world] * len(groups),
            "param_slice_mappings": [{"a": fragment_address(3, 0)}],
            key: [split(one, rank, world, padded).requires_grad_() for one in groups],
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        _save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, folder, name, without)
    for rank in range(world if stage == 3 else 1):
        trained = {name: one.bfloat16() for group in groups for name, one in group.items()}
        module = {**trained, **frozen}
        parts = {name: _part(one, rank, world) for name, one in frozen.items()}
        if stage == 3:
            module = {name: one.new_empty(0) for name, one in module.items()}
        state = {
            "module": {**module, **buffers},
            "buffer_names": list(buffers),
            "param_shapes": [{name: one.shape for name, one in g.items()} for g in groups],
            "frozen_param_shapes": {name: one.shape for name, one in frozen.items()},
            "frozen_param_fragments": parts if stage == 3 else dict(frozen),
            "shared_params": dict(shared),
            "ds_version": "0.19.8",
            **(extra or {}),
        }
        name = "mp_rank_00_model_states.pt"
        name = f"zero_pp_rank_{rank}_{name}" if stage == 3 else name
        _save(state, folder, name, without)
    return folder


def _part(one: Tensor, rank: int, world: int) -> Tensor:
    """The rank's part of a parameter that is padded to a multiple of the ranks."""
    length = -(-one.numel() // world)
    flat = torch.cat([one.reshape(-1), one.new_full((length * world - one.numel(),), math.nan)])
    return flat[rank * length : (rank + 1) * length].clone()


def _by_parameter(group: Mapping[str, Tensor], rank: int, world: int, padded: bool) -> Tensor:
    return torch.cat([_part(one, rank, world) for one in group.values()])


def _end_to_end(group: Mapping[str, Tensor], rank: int, world: int, padded: bool) -> Tensor:
    flat = torch.cat([one.reshape(-1) for one in group.values()])
    length = -(-flat.numel() // (2 * world)) * 2
    if padded:
        flat = torch.cat([flat, flat.new_full((length * world - flat.numel(),), math.nan)])
    return flat[rank * length : (rank + 1) * length].clone()


def _save(state: Any, folder: Path, name: str, without: Collection[str]) -> None:
    if name not in without:
        with ExitStack() as stack:
            _as_deepspeed(stack)
            torch.save(state, folder / name)


def _as_deepspeed(stack: ExitStack) -> None:
    """Pickles name DeepSpeed's modules, which stand there while it lasts."""
    modules: dict[str, ModuleType] = {}
    for one, place in _PLACES.items():
        parts = place.split(".")
        for count in range(1, len(parts) + 1):
            whole = ".".join(parts[:count])
            modules.setdefault(whole, ModuleType(whole))
        setattr(modules[place], one.__name__, one)
        stack.enter_context(patch.object(one, "__module__", place))
    stack.enter_context(patch.dict(sys.modules, modules))
