"""What does adapter_config.json say that holds for every type of adapter?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, CheckpointNotFound, UnsupportedFormat, first_names
from geoscope.formats.layout import parse_object
from geoscope.peft.keys import MERGE

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "check_type",
    "drawn_start",
    "read_config",
    "start_of",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Initialisations whose product is not zero before training, and is taken out of the base: a name
# begins so (pissa_niter_16). In eva, gaussian, mica and orthogonal it is zero.
_NOT_FROM_ZERO = ("pissa", "olora", "corda", "milora", "loftq", "lora_ga")

# What the types that are not read do, where merging is no way out.
_NO_WEIGHTS = "it learns prompts and changes no weight"
_NOT_MERGEABLE = {
    "ADAPTION_PROMPT": _NO_WEIGHTS,
    "CARTRIDGE": _NO_WEIGHTS,
    "CPT": _NO_WEIGHTS,
    "MULTITASK_PROMPT_TUNING": _NO_WEIGHTS,
    "PREFIX_TUNING": _NO_WEIGHTS,
    "PROMPT_TUNING": _NO_WEIGHTS,
    "P_TUNING": _NO_WEIGHTS,
    "POLY": "it mixes its adapters by task, so there is no one update",
    "XLORA": "it mixes its adapters for every token, so there is no one update",
}


def read_config(folder: Path, given: str, types: Collection[str]) -> dict[str, Any]:
    """adapter_config.json, with a `peft_type` of `types`.

    Raises CheckpointNotFound, UnsupportedFormat (another type, by name), CheckpointError.
    """
    try:
        text = (folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        below = [f"{given}/{one.parent.name}" for one in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))]
        hint = f"give {first_names(below)}" if below else "give the folder of a PEFT adapter"
        raise CheckpointNotFound(f"{given}: holds no {ADAPTER_CONFIG}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{given}/{ADAPTER_CONFIG}: cannot be read: {error}") from None
    config = parse_object(text, f"{given}/{ADAPTER_CONFIG}")
    check_type(config, given, types)
    return config


def check_type(config: Mapping[str, Any], given: str, types: Collection[str]) -> None:
    """Raises UnsupportedFormat, by name, for a `peft_type` that is none of `types`."""
    kind = config.get("peft_type")
    if kind not in types:
        way_out = _NOT_MERGEABLE.get(str(kind), MERGE)
        raise UnsupportedFormat(
            f"{given}: peft_type is {kind!r}; geoscope reads {', '.join(types)} adapters. {way_out}"
        )


def start_of(config: Mapping[str, Any]) -> str | None:
    """Why the product is not zero before training, by `init_lora_weights`; None where it is."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_NOT_FROM_ZERO):
        return f"init_lora_weights is {start!r}"
    return None


def drawn_start(config: Mapping[str, Any]) -> str | None:
    """What to say of factors that were both drawn at random, over a base that stayed as it was."""
    if config.get("init_lora_weights") is not False:
        return None
    return (
        "init_lora_weights is false: both factors were drawn at random, so the product was not "
        "zero before training, and is counted with the update; give the adapter before training "
        "as `initial_adapter`"
    )
