"""How are DeepSpeed's ZeRO shards read as one model? The fp32 masters of all ranks, put together.

    mp_rank_00_model_states.pt                            ZeRO-1 and 2: names, shapes, buffers
    zero_pp_rank_<r>_mp_rank_00_model_states.pt           ZeRO-3: the same, and the parts of rank r
    bf16_zero_pp_rank_<r>_mp_rank_00_optim_states.pt      the flat fp32 groups of rank r

ZeRO-1 and 2 lay the parameters of a group end to end and cut the whole once: rank r holds the r-th
part. ZeRO-3 cuts every parameter into equal parts, the last one padded, and lays those of one rank
end to end. Frozen parameters and buffers lie in the model states, in the dtype stored.

The files are mapped and opened with `weights_only`; DeepSpeed's own classes in them are inert. The
moments of the optimizer are not touched. [deepspeed/utils/zero_to_fp32.py]
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.formats.container import FileHeader, byte_view
from geoscope.formats.links import refuse_link_to_elsewhere
from geoscope.formats.pickle_file import load_pickle, mapped_limit
from geoscope.formats.refused import by_files, refusal
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["ZeroShards", "is_zero"]

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]{1,6})_mp_rank_00_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]{1,6})_)?mp_rank_00_model_states\.pt")
_STATES = re.compile(r".*_states\.pt")
_OPTIMIZER = "optimizer_state_dict"
_FLAT = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
_FLAT[3] = "fp32_flat_groups"
_EXPERT_LAYERS = ("ds_autoep_layers", "autoep_layers")


def is_zero(names: Collection[str]) -> bool:
    """Whether a folder with these files holds ZeRO shards that are read: of data parallelism alone,
    without parts of tensor, pipeline or expert parallelism."""
    states = [name for name in names if _STATES.fullmatch(name)]
    return any(_OPTIM.fullmatch(name) for name in states) and all(
        _OPTIM.fullmatch(name) or _MODEL.fullmatch(name) for name in states
    )


class _Inert:
    """Stands for an object of DeepSpeed: it is made, and does nothing."""

    def __setstate__(self, state: Any) -> None:
        """The state is not needed."""


class _Stage(int):
    """Stands for ZeroStageEnum."""


_INERT: Mapping[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Inert,
    "deepspeed.utils.tensor_fragment.fragment_address": _Inert,
}


@dataclass(frozen=True)
class _Segment:
    """Entries begin … begin + length − 1 of a flat tensor: `key` of the file of that number."""

    file: int
    key: str
    begin: int
    length: int


@dataclass(frozen=True)
class _Flat:
    """A tensor and the segments that it is laid together from, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    segments: tuple[_Segment, ...]

    def info(self, name: str) -> TensorInfo:
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        dtype = str(self.dtype).removeprefix("torch.")
        return TensorInfo(name, self.shape, dtype, nbytes, "*_states.pt")


@dataclass
class ZeroShards:
    """The files of all ranks on this disk, read as one file of whole tensors. told: of what they
    are, "ZeRO-2 of 8 ranks"."""

    folder: Path
    label: str
    files: tuple[str, ...]
    told: str
    header: FileHeader = field(repr=False)
    stored: Mapping[str, _Flat] = field(repr=False)
    _loaded: list[dict[str, torch.Tensor] | None] = field(repr=False)
    _touched: list[int] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, names: Collection[str], label: str) -> ZeroShards:
        """The shards in a folder. Raises CheckpointError, UnsupportedFormat."""
        shards = _Files(folder, frozenset(names), label)
        stored, shared, told = _tensors(shards)
        infos = {name: one.info(name) for name, one in stored.items()}
        # groups first: the number of a rank is that of its file
        files = shards.by_rank(_OPTIM) + shards.by_rank(_MODEL)
        return cls(
            folder, label, files, told, FileHeader(infos, shared), stored,
            [None] * len(files), [0] * len(files),
        )  # fmt: skip

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        one = self.stored[name]
        flat = byte_view(self.header.tensors[name].nbytes, buffer).view(one.dtype)
        self._gather(one, 0, math.prod(one.shape), flat)
        return flat.reshape(one.shape)

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        one = self.stored[name]
        flat = byte_view((end - begin) * one.dtype.itemsize, None).view(one.dtype)
        self._gather(one, begin, end, flat)
        return flat

    def _gather(self, one: _Flat, begin: int, end: int, out: torch.Tensor) -> None:
        """Entries begin … end − 1 into `out`."""
        place = 0
        for part in one.segments:
            low, high = max(begin, place), min(end, place + part.length)
            if low < high:
                start = part.begin + low - place
                source = self._tensors(part.file)[part.key].detach().reshape(-1)
                out[low - begin : high - begin].copy_(source[start : start + high - low])
                self._touched[part.file] += (high - low) * one.dtype.itemsize
            place += part.length

    def _tensors(self, number: int) -> dict[str, torch.Tensor]:
        """Those of one file; the mapping is renewed now and then, because its pages count."""
        loaded = self._loaded[number]
        if loaded is None or self._touched[number] > mapped_limit(len(self.files)):
            shards = _Files(self.folder, frozenset(self.files), self.label)
            loaded = _flat_tensors(shards.load(self.files[number]))
            self._loaded[number], self._touched[number] = loaded, 0
        return loaded

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / file for file in self.files)

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files for itself."""
        return {**self.__dict__, "_loaded": [None] * len(self.files)}


def _flat_tensors(loaded: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What is read of a file: flat groups by number, parts of frozen parameters, the module."""
    found = {f"module:{name}": one for name, one in (loaded.get("module") or {}).items()}
    fragments = loaded.get("frozen_param_fragments") or {}
    found |= {f"frozen:{name}": one for name, one in fragments.items()}
    state = loaded.get(_OPTIMIZER) or {}
    groups = next((state[key] for key in _FLAT.values() if key in state), [])
    return found | {f"group:{number}": one for number, one in enumerate(groups)}


# --- the files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """The files of a folder, each opened from its beginning when asked for."""

    folder: Path
    names: frozenset[str]
    label: str

    def by_rank(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        ranks = {name: match for name in self.names if (match := pattern.fullmatch(name))}
        return tuple(sorted(ranks, key=lambda name: int(ranks[name][1] or 0)))

    def load(self, name: str) -> dict[str, Any]:
        """A file as `weights_only` reads it. Raises CheckpointError."""
        refuse_link_to_elsewhere(self.folder / name, self.label)
        try:
            loaded = load_pickle(self.folder / name, f"{self.label}/{name}", inert=_INERT)[0]
        except UnsupportedFormat:
            raise self.refused(f"{name} holds objects of code") from None
        if not isinstance(loaded, dict):
            raise self.damaged(f"{name} holds {type(loaded).__name__}, not a table")
        return loaded

    def refused(self, why: str) -> UnsupportedFormat:
        """The refusal of shards that are not read, with the command that converts them."""
        known = by_files(self.names)
        assert known is not None  # the names of the files made them ZeRO shards
        needs = "geoscope reads plain ZeRO shards, without running code."
        return refusal(self.label, replace(known, evidence=why, needs=needs))

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"`{self.label}`: ZeRO shards: {why}; copy the checkpoint again")


# --- which entries are whose ----------------------------------------------------------------------


def _tensors(shards: _Files) -> tuple[dict[str, _Flat], dict[str, str], str]:
    """Every tensor by its name, name → the name it repeats, and of what the shards are."""
    try:
        optims, models = shards.by_rank(_OPTIM), shards.by_rank(_MODEL)
        groups = [_groups(shards, name) for name in optims]
        stage, world, _ = groups[0]
        models = models if stage == 3 else models[:1]
        if len(groups) != world or len(models) != (world if stage == 3 else 1):
            raise CheckpointError(
                f"`{shards.label}`: ZeRO-{stage} shards of {world} ranks, and {len(groups)} files "
                f"of groups and {len(models)} of model states are there; still being written, or "
                "cut: copy them all"
            )
        states = [shards.load(name) for name in models]
        told = f"ZeRO-{stage} of {world} rank{'s' * (world > 1)}"
        return *_laid_out(states, [sizes for *_, sizes in groups], stage, shards), told
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise shards.damaged(f"not as DeepSpeed writes them ({type(error).__name__})") from None


def _groups(shards: _Files, name: str) -> tuple[int, int, tuple[int, ...]]:
    """Stage, number of ranks, and the entries of each flat group of one rank."""
    state = shards.load(name)[_OPTIMIZER]
    stage, count = int(state["zero_stage"]), state["partition_count"]
    world = max(count) if isinstance(count, list) else int(count)
    return stage, world, tuple(one.numel() for one in state[_FLAT[stage]])


def _laid_out(
    states: Sequence[Mapping[str, Any]],
    sizes: Sequence[Sequence[int]],
    stage: int,
    shards: _Files,
) -> tuple[dict[str, _Flat], dict[str, str]]:
    first = states[0]
    if any(first.get(key) for key in _EXPERT_LAYERS):
        raise shards.refused("its experts are split over the ranks")
    found = dict(_whole(first, len(sizes), stage))
    if stage == 3:
        found |= _frozen_parts(states, len(sizes))
        shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
        found |= _by_parameter(shapes, sizes, shards)
    else:
        for number, shapes in enumerate(first["param_shapes"]):
            found |= _end_to_end(shapes, number, [one[number] for one in sizes], shards)
    shared = {one: kept for one, kept in first.get("shared_params", {}).items() if kept in found}
    found |= {one: found[kept] for one, kept in shared.items()}
    return found, shared


def _whole(state: Mapping[str, Any], number: int, stage: int) -> Iterator[tuple[str, _Flat]]:
    """Buffers, and up to ZeRO-2 the frozen parameters; trained ones among them are replaced."""
    for name, one in state["module"].items():
        if hasattr(one, "numel") and (stage < 3 or name in state["buffer_names"]):
            yield name, _laid(one.shape, one.dtype, [(number, f"module:{name}", 0, one.numel())])


def _frozen_parts(states: Sequence[Mapping[str, Any]], first: int) -> dict[str, _Flat]:
    """Frozen parameters under ZeRO-3: a part in the model states of every rank."""
    found: dict[str, _Flat] = {}
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        parts = [state["frozen_param_fragments"][name] for state in states]
        pieces = [(first + i, f"frozen:{name}", 0, one.numel()) for i, one in enumerate(parts)]
        found[name] = _laid(shape, parts[0].dtype, pieces)
    return found


def _by_parameter(
    shapes: Mapping[str, Sequence[int]], sizes: Sequence[Sequence[int]], shards: _Files
) -> dict[str, _Flat]:
    """ZeRO-3: of each parameter ⌈entries/ranks⌉ in every rank, end to end over its groups."""
    import torch

    found: dict[str, _Flat] = {}
    begin = 0
    for name, shape in shapes.items():
        length = -(-math.prod(shape) // len(sizes))
        pieces = [
            (rank, f"group:{group}", start, count)
            for rank, groups in enumerate(sizes)
            for group, start, count in _in_groups(groups, begin, begin + length)
        ]
        found[name] = _laid(shape, torch.float32, pieces)
        begin += length
    if any(sum(groups) != begin for groups in sizes):
        raise shards.damaged(f"{begin} entries a rank are named, {sum(sizes[0])} are there")
    return found


def _in_groups(groups: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, place and length in each group of entries begin … end − 1 of all end to end."""
    place = 0
    for number, size in enumerate(groups):
        low, high = max(begin, place), min(end, place + size)
        if low < high:
            yield number, low - place, high - low
        place += size


def _end_to_end(
    shapes: Mapping[str, Sequence[int]], group: int, sizes: Sequence[int], shards: _Files
) -> dict[str, _Flat]:
    """ZeRO-1 and 2: the parameters of a group end to end, cut into the parts of the ranks."""
    import torch

    found: dict[str, _Flat] = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape)
        pieces = [
            (rank, f"group:{group}", start, count)
            for rank, start, count in _in_groups(sizes, begin, end)
        ]
        found[name] = _laid(shape, torch.float32, pieces)
        begin = end
    # DeepSpeed pads a group up to a multiple of twice the ranks, and takes the padding off or not.
    step = 2 * len(sizes)
    if -(-begin // step) != -(-sum(sizes) // step):
        raise shards.damaged(f"group {group} has {sum(sizes)} entries, {begin} are named")
    return found


def _laid(
    shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[tuple[int, str, int, int]]
) -> _Flat:
    """A tensor from the first of these entries: behind it is padding. Raises ValueError."""
    left = math.prod(shape)
    found: list[_Segment] = []
    for file, key, begin, length in pieces:
        found.append(_Segment(file, key, begin, min(length, left)))
        left -= found[-1].length
    if left:
        raise ValueError(f"{left} entries are not there")
    return _Flat(tuple(shape), dtype, tuple(found))
