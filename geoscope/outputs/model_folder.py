"""How is a model written again with some of its matrices replaced and everything else untouched?

The shards keep their names and their tensors. Tensors out of safetensors files are copied byte for
byte; out of pickles they are read, and shards become safetensors under the stem of theirs
(`pytorch_model-00001-of-00002.bin` → `model-00001-of-00002.safetensors`).
One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from geoscope.formats.layout import shard_count
from geoscope.formats.readers import SAFETENSORS
from geoscope.formats.safetensors_file import SafetensorsFile
from geoscope.formats.safetensors_writer import FilePlan, TensorPlan
from geoscope.models.checkpoint import Checkpoint
from geoscope.outputs.output import Output
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX", "SINGLE", "ModelPlan", "plan_model", "write_model"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelPlan:
    """The weight files of a model before their data.

    files: name of the new file → its plan. sources: the same → name of the file it is made from.
    index: bytes of `model.safetensors.index.json`, None for a single file. notes: one-line remarks.
    """

    files: Mapping[str, FilePlan]
    sources: Mapping[str, str]
    index: bytes | None
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Name → exact bytes of every file, for `OutputFolder`."""
        sizes = {name: plan.nbytes for name, plan in self.files.items()}
        if self.index is not None:
            sizes[INDEX] = len(self.index)
        return sizes

    @property
    def order(self) -> tuple[str, ...]:
        """Tensors in the order in which they are written: that in which to make them."""
        return tuple(name for plan in self.files.values() for name in plan.order)


def plan_model(
    checkpoint: Checkpoint, replaced: Mapping[str, str], metadata: Mapping[str, str]
) -> ModelPlan:
    """The plan for a checkpoint whose tensors `replaced` (name → new dtype) change their bytes.

    From headers alone: nothing is downloaded. `metadata` goes into every file, beside the format.
    """
    by_file: dict[str, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        by_file.setdefault(info.source, []).append(info)
    files: dict[str, FilePlan] = {}
    sources: dict[str, str] = {}
    for file, infos in sorted(by_file.items()):
        new = _new_name(file, alone=len(by_file) == 1)
        tensors = {
            info.name: TensorPlan(replaced.get(info.name, info.dtype), _disk_shape(info))
            for info in infos
        }
        files[new] = FilePlan(tensors, metadata)
        sources[new] = file
    index = None if set(files) == {SINGLE} else _index(files)
    return ModelPlan(files, sources, index, _notes(sources))


def _new_name(file: str, *, alone: bool) -> str:
    if alone and shard_count(file) == 1:
        return SINGLE  # the one name under which a single file is loaded
    path = PurePosixPath(file)
    if path.suffix == SAFETENSORS:
        return file
    return re.sub(r"^pytorch_model", "model", path.stem) + SAFETENSORS


def _disk_shape(info: TensorInfo) -> tuple[int, ...]:
    return info.shape[::-1] if info.transposed else info.shape


def _index(files: Mapping[str, FilePlan]) -> bytes:
    """The index as transformers writes it: names sorted, `total_size` the bytes of all tensors."""
    weight_map = {name: file for file, plan in files.items() for name in plan.tensors}
    table = {
        "metadata": {"total_size": sum(plan.data_bytes for plan in files.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(table, indent=2) + "\n").encode()


def _notes(sources: Mapping[str, str]) -> tuple[str, ...]:
    renamed = [(old, new) for new, old in sources.items() if old != new]
    if not renamed:
        return ()
    old, new = renamed[0]
    return (
        f"{len(renamed)} weight {'file is' if len(renamed) == 1 else 'files are'} written as "
        f"safetensors under the usual name, {old} as {new}",
    )


def write_model(
    out: Output,
    folder: str,
    checkpoint: Checkpoint,
    plan: ModelPlan,
    replacement: Callable[[str], torch.Tensor | None],
) -> None:
    """The weight files and the index, into `folder` ("" or "residual") of the output.

    `replacement(name)` gives the new tensor, oriented as the file holds it, or None for one that is
    copied; it is asked for every tensor, in the order of `plan.order`.
    """
    prefix = f"{folder}/" if folder else ""
    for file, file_plan in plan.files.items():
        container = checkpoint.source.open(plan.sources[file])
        with out.tensors(prefix + file, file_plan) as writer:
            for name in file_plan.order:
                new = replacement(name)
                if new is not None:
                    writer.write(name, new)
                elif isinstance(container, SafetensorsFile):
                    writer.copy(name, container)
                else:
                    writer.write(name, container.read(name, None))
                del new
    if plan.index is not None:
        out.write(prefix + INDEX, plan.index)
