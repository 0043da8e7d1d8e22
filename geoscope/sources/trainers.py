"""Where does a trainer put the weights below the folder that a user would name? One table.

A new layout is one more row of FOLDERS. verl's Megatron writes a manifest, too, which says where
the weights are; it is written last, so that a save with it is complete. DeepSpeed names the
sub-folder of its last save in a file `latest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from geoscope.foreign import parsed, small_text
from geoscope.formats.links import is_plain_name

__all__ = ["FOLDERS", "MANIFEST", "Manifest", "TrainerFolder", "latest_tag", "manifests"]

MANIFEST = "ckpt_contents.json"
LATEST = "latest"


@dataclass(frozen=True)
class TrainerFolder:
    """A sub-folder with weights. has_manifest: whether the trainer writes a manifest two folders
    above."""

    folder: str
    trainers: str
    has_manifest: bool = False


# In the order of search.
FOLDERS = (
    TrainerFolder("actor", "verl FSDP"),
    TrainerFolder("lora_adapter", "verl, of the folder actor"),
    TrainerFolder("actor/lora_adapter", "verl"),
    TrainerFolder("huggingface", "verl FSDP with hf_model, of the folder actor"),
    TrainerFolder("actor/huggingface", "verl FSDP with hf_model"),
    TrainerFolder("model/huggingface", "verl Megatron, of the folder actor", has_manifest=True),
    TrainerFolder("actor/model/huggingface", "verl Megatron", has_manifest=True),
    TrainerFolder("hf_model", "NExt, AlphaRL"),
    TrainerFolder("policy", "SkyRL"),
    TrainerFolder("policy/huggingface", "SkyRL"),
    TrainerFolder("policy/weights", "NeMo-RL"),
    TrainerFolder("policy/weights/model", "NeMo-RL"),
    TrainerFolder("policy/weights/iter_0000000", "NeMo-RL with Megatron"),
    TrainerFolder("trainer", "prime-rl"),
    TrainerFolder("pytorch_model_fsdp_0", "Accelerate"),
    TrainerFolder("dist_ckpt", "verl Megatron, of the folder actor"),
    TrainerFolder("actor/dist_ckpt", "verl Megatron"),
    TrainerFolder("model/dist_ckpt", "verl Megatron, of the folder actor"),
    TrainerFolder("actor/model/dist_ckpt", "verl Megatron"),
)
# Where a manifest may lie below the folder that was named.
_ROOTS = ("", "actor")


@dataclass(frozen=True)
class Manifest:
    """What verl says of a save. folder: that of the model as Hugging Face has it, from the folder
    that was named; None where there is none, or where it is the base of an adapter."""

    root: str
    folder: str | None


def manifests(path: Path) -> tuple[Manifest, ...]:
    """The manifests that can be read below a folder."""
    found = ((root, _read(path / root / MANIFEST)) for root in _ROOTS)
    return tuple(Manifest(root, _model(root, text)) for root, text in found if text is not None)


def latest_tag(path: Path) -> str | None:
    """The sub-folder that DeepSpeed's file `latest` names, such as global_step200; None without."""
    try:
        tag = small_text(path / LATEST).strip()
    except (OSError, ValueError):
        return None
    return tag if is_plain_name(tag) else None


def _read(file: Path) -> Mapping[str, Any] | None:
    try:
        found = parsed(small_text(file))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _model(root: str, manifest: Mapping[str, Any]) -> str | None:
    """Of a LoRA run the bridge writes the base alone, and the adapter lies in Megatron's shards."""
    contents, backend = manifest.get("contents"), manifest.get("backend")
    if not isinstance(contents, dict) or (isinstance(backend, dict) and backend.get("peft")):
        return None
    for entry in (contents.get("hf_model"), contents.get("model")):
        if isinstance(entry, dict) and entry.get("format") == "huggingface":
            path = PurePosixPath(str(entry.get("path")))
            if not path.is_absolute() and ".." not in path.parts:
                return (PurePosixPath(root) / path).as_posix()
    return None
