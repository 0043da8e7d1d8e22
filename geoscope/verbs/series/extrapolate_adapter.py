"""A predicted adapter: the combination of a series of updates as one LoRA, never made dense.

Σ_i w_i·Δ_i of T adapters of rank r is a product of rank T·r at most; what is written is its best
approximation of a smaller rank [Eckart & Young 1936], on the base that the updates are of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope.adapters.conversion import Compressed, compressed
from geoscope.adapters.peft_config import config_bytes
from geoscope.adapters.peft_names import lora_keys
from geoscope.engine import matrix_boundary
from geoscope.errors import NumericsError, OptionError, PairingError, first_names
from geoscope.files import record_bytes, record_size
from geoscope.foreign import local_path
from geoscope.formats.hashes import tensor_sha256
from geoscope.formats.safetensors_writer import FilePlan
from geoscope.linalg import Product
from geoscope.outputs.output import MemoryFolder, TensorOutput, output_of
from geoscope.peft.adapter import Adapter
from geoscope.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from geoscope.peft.folder import RECORD, RECORD_SCHEMA
from geoscope.peft.lora import unstacked
from geoscope.records import IN_MEMORY, Status
from geoscope.verbs.adapters.plain_lora import carried, plain_config, plain_plan, scaling_of_all
from geoscope.verbs.series.tensors import AdapterTensor, MatchedSeries

__all__ = ["Predict", "PredictedAdapter", "input_paths", "write_adapter"]

# The update of a module at the target step, from those of all steps.
Predict = Callable[[str, list[Product]], Product]


@dataclass(frozen=True, eq=False)
class PredictedAdapter:
    """rank: that of the adapter. discarded: the part of the energy that it leaves out. held:
    module → why it is as the last adapter has it. config: adapter_config.json. models: its tensors,
    where no folder was written.
    """

    rank: int
    discarded: float
    held: Mapping[str, str]
    config: Mapping[str, Any]
    models: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class _Written:
    energy: float
    discarded: float


def write_adapter(
    found: MatchedSeries,
    predict: Predict,
    out: Path | None,
    record: Mapping[str, Any],
    *,
    base: str | None,
    rank: int | None,
    force: bool,
) -> PredictedAdapter:
    """A PEFT adapter, into `out` or in memory.

    base: of the adapter; default what the last one names. rank: default twice that of the last
    adapter. record: goes into geoscope.json. Raises OptionError, CheckpointError, PairingError.
    """
    last = _tensors(found)[0].adapters[-1]
    reference = _checked_base(found, last, base)
    rank = _rank_of(last, rank)
    plan = plain_plan(last, rank, carried(last))
    revision = last.revision if base is None else None
    table = plain_config(last, rank, reference, revision)
    config = config_bytes(table)
    sizes = {
        ADAPTER_WEIGHTS: plan.nbytes,
        ADAPTER_CONFIG: len(config),
        RECORD: record_size(len(last.modules)),
    }
    held: dict[str, str] = {}
    with output_of(out, sizes, force=force, inputs=input_paths(found)) as folder:
        with folder.tensors(ADAPTER_WEIGHTS, plan) as writer:
            written, hashes = _write_factors(found, last, predict, rank, plan, writer, held)
        energy = math.fsum(module.energy for module in written)
        discarded = math.fsum(module.discarded for module in written)
        discarded = discarded / energy if energy > 0 else 0.0
        whole = {
            **record,
            "tensors": {**record["tensors"], **dict.fromkeys(held, "hold")},
            "notes": [*record["notes"], *(f"{name}: {why}; copied" for name, why in held.items())],
            "schema": RECORD_SCHEMA,
            "base": {"reference": reference, "commit": revision},
            "method": "extrapolated",
            "extrapolator": record["method"],
            "layout": None,
            "rank": rank,
            "discarded": discarded,
            "sha256": hashes,
        }
        folder.write(RECORD, record_bytes(whole))
        folder.write(ADAPTER_CONFIG, config)
    models = (folder.tensors_in("."),) if isinstance(folder, MemoryFolder) else ()
    return PredictedAdapter(rank, discarded, held, table, models)


def _checked_base(found: MatchedSeries, last: Adapter, base: str | None) -> str | None:
    """The reference of the base, None for one in memory. Raises for an adapter that cannot be
    written as a plain one."""
    last.refuse_more_than_plain("extrapolate")
    is_in_memory = found.refs[0].is_in_memory
    reference = _named_base(last) if is_in_memory or base is None else base
    if reference is None and not (is_in_memory or last.ref.is_in_memory):
        raise OptionError(f"{last.given}: names no base; give it as `base`")
    followed = {tensor.module for tensor in _tensors(found)}
    if unfollowed := [name for name in last.modules if name not in followed]:
        raise PairingError(
            f"{last.given}: {len(unfollowed)} modules are not followed "
            f"({first_names(unfollowed)}), so no whole adapter can be written; leave `include`, "
            "`exclude` and `layers` out"
        )
    return reference


def _rank_of(last: Adapter, rank: int | None) -> int:
    """The rank to write, by default twice that of the last adapter. Raises OptionError."""
    least = min(min(module.shape) for module in last.modules.values())
    chosen = min(2 * int(last.config["r"]), least) if rank is None else rank
    _check_rank(chosen, least, last)
    return chosen


def input_paths(found: MatchedSeries) -> list[Path]:
    """Files and folders that the output must not be written over: the folder of a run, too."""
    stored = [one for one in found.series.points if not one.resolved.startswith(IN_MEMORY)]
    points = [local_path(point.given) for point in stored]
    base = [] if found.refs[0].is_in_memory else [local_path(found.refs[0].given)]
    return [path for path in (*base, *points, *(one.parent for one in points)) if path.exists()]


def _write_factors(
    found: MatchedSeries,
    last: Adapter,
    predict: Predict,
    rank: int,
    plan: FilePlan,
    writer: TensorOutput,
    held: dict[str, str],
) -> tuple[list[_Written], dict[str, str]]:
    """Factors of every module, and what is carried over; their energies, and hashes by name."""
    scaling, hashes = scaling_of_all(last), dict[str, str]()
    keys = {lora_keys(module.path)[0]: module for module in last.modules.values()}
    waiting: dict[str, Tensor] = {}
    written: list[_Written] = []
    for name in plan.order:
        if name in keys:
            module = keys[name]
            of_module = [tensor for tensor in _tensors(found) if tensor.module == module.name]
            made = [_compressed(tensor, predict, rank, scaling, held) for tensor in of_module]
            written += [_Written(each.energy, each.discarded) for each in made]
            B, A = (torch.cat(side) for side in zip(*((x.B, x.A) for x in made), strict=True))
            waiting[lora_keys(module.path)[1]], tensor = unstacked(B, A, is_turned=module.is_turned)
        else:
            tensor = waiting.pop(name) if name in waiting else last.read(name)
        hashes[name] = tensor_sha256(tensor)
        writer.write(name, tensor)
    return written, hashes


def _compressed(
    tensor: AdapterTensor,
    predict: Predict,
    rank: int,
    scaling: float,
    held: dict[str, str],
) -> Compressed:
    """The prediction of one matrix as factors; its last update, noted in `held`, where it fails."""
    updates = tensor.updates()
    try:
        with matrix_boundary():
            return compressed(predict(tensor.name, updates), rank, scaling)
    except NumericsError as error:
        held[tensor.name] = f"{Status.NOT_CONVERGED.value}: {error}"
    with matrix_boundary(tensor.name):
        return compressed(updates[-1], rank, scaling)


def _tensors(found: MatchedSeries) -> list[AdapterTensor]:
    """The matrices of the adapters, experts of a stack in their order."""
    return [tensor for tensor in found.tensors.values() if isinstance(tensor, AdapterTensor)]


def _named_base(last: Adapter) -> str | None:
    """What its config names; a path that is told from its own folder in full."""
    name = last.base
    if name is None or Path(name).exists() or last.base_folder is None:
        return name
    return str(last.base_folder)


def _check_rank(rank: int, least: int, last: Adapter) -> None:
    if not 1 <= rank <= least:
        raise OptionError(
            f"`rank` {rank}: the smallest adapted matrix of {last.given} has a side of {least}; "
            f"give a rank from 1 to {least}"
        )
