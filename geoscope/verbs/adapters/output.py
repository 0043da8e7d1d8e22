"""The files of an initial adapter: planned to the byte, written one matrix at a time.

Factors come in the order of the base's shards and are stored in that of their names, so they wait
in a nameless file on the same disk; a model of any size then costs one matrix of memory.
"""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from geoscope._version import __version__
from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.layouts import paired
from geoscope.adapters.peft_config import (
    adapter_config,
    config_bytes,
)
from geoscope.adapters.peft_names import stack_experts, unstack_experts
from geoscope.files import SMALL, record_bytes, record_size
from geoscope.formats.hashes import tensor_sha256
from geoscope.formats.safetensors_writer import FilePlan, TensorPlan
from geoscope.models.checkpoint import Checkpoint
from geoscope.outputs.model_folder import ModelPlan, plan_model
from geoscope.outputs.output import Output, file_size
from geoscope.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from geoscope.peft.folder import RECORD
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.targets import Target, Targets

__all__ = [
    "CARD",
    "AdapterFiles",
    "Spool",
    "plan_files",
    "write_configs",
    "write_record",
]

CARD = "README.md"


@dataclass(frozen=True)
class AdapterFiles:
    """folders: where adapters go, the trained one first. plan: of each weight file. model: that of
    the rewritten base, None where there is none. travelling: configuration and tokenizer.
    """

    folders: tuple[str, ...]
    plan: FilePlan
    model: ModelPlan | None
    travelling: Mapping[str, Path | bytes]
    notes: tuple[str, ...]

    def sizes(self, matrices: int) -> dict[str, int]:
        """Name → bytes of every file, a bound for those that are written at the end."""
        sizes: dict[str, int] = {RECORD: record_size(matrices), self.card: SMALL}
        for folder in self.folders:
            sizes[folder + ADAPTER_WEIGHTS] = self.plan.nbytes
            sizes[folder + ADAPTER_CONFIG] = SMALL
        if self.model is not None:
            sizes |= {f"residual/{name}": size for name, size in self.model.sizes.items()}
            sizes |= {
                f"residual/{name}": file_size(source) for name, source in self.travelling.items()
            }
        return sizes

    @property
    def spool_bytes(self) -> int:
        """What `Spool` holds on the disk until the end: the factors once more."""
        return self.plan.data_bytes * len(self.folders)

    @property
    def card(self) -> str:
        return ("adapter/" if self.model is not None else "") + CARD


def plan_files(checkpoint: Checkpoint, targets: Targets, options: InitOptions) -> AdapterFiles:
    """Every file of the output, from headers alone."""
    layout = options.chosen_layout
    metadata = {
        "geoscope_version": __version__,
        "layout": layout or "none",
        "initial": "true",
        **({"base_sha": checkpoint.ref.commit} if checkpoint.ref.commit else {}),
    }
    tensors: dict[str, TensorPlan] = {}
    for weight in targets.weights.values():
        (m, n), rank = weight.shape, options.written_rank * (weight.experts or 1)
        key_A, key_B = weight.keys
        tensors[key_A] = TensorPlan("float32", (rank, n))
        tensors[key_B] = TensorPlan("float32", (m, rank))
    model, travelling, notes = None, {}, ()
    if layout == "residual":
        dtype = options.residual_dtype or "float32"
        model = plan_model(checkpoint, dict.fromkeys(targets.weights, dtype), metadata)
        travelling, notes = checkpoint.source.travelling()
        notes = (*model.notes, *notes)
    folders = {"residual": ("adapter/",), "anchor": ("adapter/", "anchor/")}.get(layout, ("",))
    return AdapterFiles(folders, FilePlan(tensors, metadata), model, travelling, notes)


class Spool:
    """Factors on their way to the adapter files; use it in a `with` statement.

    folder: where they wait, in a nameless file; None for the memory.
    """

    def __init__(self, folder: Path | None, layout: str) -> None:
        is_here = folder is None
        self._file: BinaryIO = io.BytesIO() if is_here else tempfile.TemporaryFile(dir=folder)
        self._layout = layout
        self._reading = threading.Lock()
        self._places: dict[tuple[int, str], tuple[int, tuple[int, ...]]] = {}

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def keep(self, target: Target, factors: Sequence[LoraFactors]) -> dict[str, str]:
        """The factors of a weight, as its layout stores them; their hashes.

        factors: of each of its matrices.
        """
        of_each = [paired(factor, self._layout) for factor in factors]
        pairs: list[tuple[Tensor, Tensor]] = []
        for adapter in zip(*of_each, strict=True):
            A, B = ([one.cpu() for one in side] for side in zip(*adapter, strict=True))
            pairs.append((A[0], B[0]) if target.experts is None else stack_experts(A, B))
        for number, pair in enumerate(pairs):
            for key, tensor in zip(target.keys, pair, strict=True):
                self._places[number, key] = (self._file.tell(), tuple(tensor.shape))
                self._file.write(tensor.contiguous().numpy().tobytes())
        A, B = pairs[0]
        return {"sha256_A": tensor_sha256(A), "sha256_B": tensor_sha256(B)}

    def factors(self, target: Target) -> list[tuple[Tensor, Tensor]]:
        """A and B of each matrix of a weight, as they were kept for the layout residual.

        Threads may call it.
        """
        with self._reading:
            A, B = (self._read(0, key) for key in target.keys)
        return [(A, B)] if target.experts is None else unstack_experts(A, B, target.experts)

    def write(self, out: Output, files: AdapterFiles) -> None:
        """The weight file of every adapter."""
        for number, folder in enumerate(files.folders):
            with out.tensors(folder + ADAPTER_WEIGHTS, files.plan) as writer:
                for key in files.plan.order:
                    writer.write(key, self._read(number, key))

    def _read(self, number: int, key: str) -> Tensor:
        position, shape = self._places[number, key]
        tensor = torch.empty(shape, dtype=torch.float32)
        self._file.seek(position)
        self._file.readinto(tensor.numpy().reshape(-1).view("u1").data)  # pyright: ignore[reportAttributeAccessIssue]
        return tensor


def write_configs(
    out: Output, files: AdapterFiles, base: str | None, revision: str | None, targets: Targets,
    options: InitOptions,
) -> dict[str, Any]:  # fmt: skip
    """adapter_config.json, the same of every adapter."""
    config = adapter_config(
        base=base,
        revision=revision,
        rank=options.written_rank,
        alpha=options.chosen_alpha,
        targets=targets.modules,
        parameters=targets.parameters,
        fan_in_fan_out=targets.fan_in_fan_out,
    )
    for folder in files.folders:
        out.write(folder + ADAPTER_CONFIG, config_bytes(config))
    return config


def write_record(out: Output, record: Mapping[str, Any]) -> None:
    """geoscope.json."""
    out.write(RECORD, record_bytes(record))
