"""`convert_adapter`: a trained adapter as a plain LoRA, written into a folder or kept in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from geoscope._version import __version__
from geoscope.adapters.peft_config import config_bytes, max_lora_rank, vllm_findings
from geoscope.adapters.peft_names import lora_keys
from geoscope.arguments import Place, path_of
from geoscope.files import SMALL, encoded, record_size
from geoscope.formats.hashes import tensor_sha256
from geoscope.outputs.output import MemoryFolder, output_of
from geoscope.peft.adapter import Adapter
from geoscope.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from geoscope.peft.folder import CONVERTED, RECORD, RECORD_SCHEMA
from geoscope.records.card import UNNAMED, ConversionCard, conversion_card
from geoscope.sources.memory import Model, adapter_of_tensors
from geoscope.verbs.adapters.convert import Conversion, ModuleEnergy, conversion_of, discarded_share
from geoscope.verbs.adapters.output import CARD, write_record

__all__ = ["Converted", "convert_adapter", "write_conversion"]


@dataclass(frozen=True, eq=False)
class Converted:
    """A plain LoRA on the original base.

    config: adapter_config.json. modules: what a compression leaves out of each module; empty for
    the exact form. notes: one-line remarks. out: the folder that was written; without one the
    adapter is in `tensors`, under the names of adapter_model.safetensors.
    """

    config: Mapping[str, Any] = field(repr=False)
    modules: tuple[ModuleEnergy, ...] = field(repr=False)
    notes: tuple[str, ...]
    out: Path | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def adapter(self) -> Adapter:
        """The tensors as an open adapter. Raises OptionError where they were written."""
        return adapter_of_tensors(self.tensors, self.config)

    @property
    def discarded(self) -> float:
        """Share of the update's energy that the rank leaves out."""
        return discarded_share(self.modules)


def convert_adapter(
    initial: Model,
    trained: Model,
    out: Place | None = None,
    *,
    rank: int | None = None,
    base: Model | None = None,
    force: bool = False,
    command: Sequence[str] = (),
) -> Converted:
    """The trained adapter as a plain LoRA on the model it started from.

    initial: the output of `init_adapter`, or an adapter as it was before training. trained: the
    adapter after training. Both are paths, PEFT models, or what `open_adapter` made of a state
    dict. out: a folder to write; without one the tensors stay in memory. rank: compress to it; the
    exact form has twice the rank. base: the original model, where neither adapter tells it. force:
    also where the trained adapter has nothing of the initial one, and over an earlier output.
    command: the words to repeat it with, for the card.
    Raises OptionError, PairingError (the two do not belong together) or CheckpointError.

    >>> convert_adapter("OUT/", "checkpoint-500/").config["r"]  # doctest: +SKIP
    64
    """
    place = None if out is None else path_of(out, "out")
    conversion = conversion_of(initial, trained, rank=rank, base=base, force=force)
    return write_conversion(conversion, place, force=force, command=command)


def write_conversion(
    conversion: Conversion,
    out: Path | None = None,
    *,
    force: bool = False,
    command: Sequence[str] = (),
) -> Converted:
    """The conversion carried out, into a folder or in memory.

    command: the words to repeat it with, for the card.
    """
    config = config_bytes(conversion.config)
    modules = conversion.trained.modules
    sizes = {
        ADAPTER_WEIGHTS: conversion.plan.nbytes,
        ADAPTER_CONFIG: len(config),
        CARD: SMALL,
        RECORD: record_size(len(modules)),
    }
    hashes: dict[str, str] = {}
    with output_of(out, sizes, force=force, inputs=conversion.inputs) as folder:
        with folder.tensors(ADAPTER_WEIGHTS, conversion.plan) as writer:

            def put(name: str, tensor: Tensor) -> None:
                hashes[name] = tensor_sha256(tensor)
                writer.write(name, tensor)

            found = conversion.write(put)
        card = _conversion_card(conversion, out, found, command)
        folder.write(CARD, encoded(conversion_card(card)))
        write_record(folder, _conversion_record(conversion, hashes, card))
        folder.write(ADAPTER_CONFIG, config)
    tensors = folder.tensors_in(".") if isinstance(folder, MemoryFolder) else {}
    return Converted(conversion.config, found, conversion.notes, out, tensors)


def _conversion_card(
    conversion: Conversion,
    out: Path | None,
    found: Sequence[ModuleEnergy],
    command: Sequence[str],
) -> ConversionCard:
    config, base = conversion.config, conversion.origin["base"]
    return ConversionCard(
        folder=(out or Path()).as_posix(),
        base=base["reference"] or UNNAMED,
        commit=base["commit"],
        rank=config["r"],
        alpha=config["lora_alpha"],
        served_rank=None if vllm_findings(config) else max_lora_rank(config["r"]),
        discarded=discarded_share(found) if found else None,
        command=" ".join(command) or "(called as a library)",
        version=__version__,
        notes=conversion.notes,
    )


def _conversion_record(
    conversion: Conversion, hashes: Mapping[str, str], card: ConversionCard
) -> dict[str, Any]:
    """geoscope.json of a conversion: no layout, and where it comes from."""
    matrices: dict[str, dict[str, str]] = {}
    for name, one in conversion.trained.modules.items():
        key_A, key_B = lora_keys(one.path)
        matrices[name] = {"sha256_A": hashes[key_A], "sha256_B": hashes[key_B]}
    return {
        "schema": RECORD_SCHEMA,
        "geoscope_version": __version__,
        "method": CONVERTED,
        "layout": None,
        "rank": card.rank,
        "alpha": card.alpha,
        "discarded": card.discarded,
        **conversion.origin,
        "matrices": matrices,
        "command": card.command,
    }
