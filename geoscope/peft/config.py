"""What does adapter_config.json say that holds for every type of adapter?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, CheckpointNotFound, UnsupportedFormat, first_names
from geoscope.foreign import (
    COUNTS,
    FLAG,
    NUMBER,
    TABLE,
    TEXT,
    TEXTS,
    check_fields,
    either,
    reason,
    shown,
    small_text,
)
from geoscope.formats.layout import parse_object
from geoscope.patterns import PatternError, matches
from geoscope.peft.keys import MERGE

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "check_type",
    "drawn_start",
    "finds",
    "read_config",
    "start_of",
    "value_of",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Initialisations whose product is not zero before training, and is taken out of the base: a name
# begins so (pissa_niter_16). In eva, gaussian, mica and orthogonal it is zero.
_NOT_FROM_ZERO = ("pissa", "olora", "corda", "milora", "loftq", "lora_ga")

# Words for a start that is drawn at random and stays in the model.
_DRAWN = ("uniform", "xavier_uniform", "kaiming_uniform", "gaussian")

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
        text = small_text(folder / ADAPTER_CONFIG)
    except FileNotFoundError:
        below = [f"{given}/{one.parent.name}" for one in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))]
        hint = f"give {first_names(below)}" if below else "give the folder of a PEFT adapter"
        raise CheckpointNotFound(f"{given}: holds no {ADAPTER_CONFIG}; {hint}") from None
    except OSError as error:
        what = f"{given}/{ADAPTER_CONFIG}: cannot be read: {reason(error)}"
        raise CheckpointError(what) from None
    config = parse_object(text, f"{given}/{ADAPTER_CONFIG}")
    check_type(config, given, types)
    return config


def check_type(config: Mapping[str, Any], given: str, types: Collection[str]) -> None:
    """Raises UnsupportedFormat, by name, for a `peft_type` that is none of `types`, and
    CheckpointError for a field of another form than PEFT writes."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in types:
        way_out = _NOT_MERGEABLE.get(str(kind), MERGE)
        raise UnsupportedFormat(
            f"{given}: peft_type is {shown(kind)}; geoscope reads {', '.join(types)} adapters. "
            f"{way_out}"
        )
    check_fields(config, _FIELDS, f"{given}/{ADAPTER_CONFIG}")


_NAMES = either(TEXT, TEXTS)
_FIELDS = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "bias", "peft_version"), TEXT),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), FLAG),
    **dict.fromkeys(("save_projection", "use_qalora"), FLAG),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), TABLE),
    **dict.fromkeys(("target_modules", "exclude_modules"), _NAMES),
    **dict.fromkeys(("target_parameters", "modules_to_save", "feedforward_modules"), _NAMES),
    "layers_to_transform": COUNTS,
    "init_lora_weights": either(FLAG, TEXT),
    "lora_dropout": NUMBER,
}


def finds(rule: Callable[[str, str], bool], pattern: str, module: str) -> bool:
    """Whether an expression of the config names a module; rule: of `geoscope.patterns`.

    Raises CheckpointError for an expression that cannot be used.
    """
    try:
        return rule(pattern, module)
    except PatternError as error:
        raise CheckpointError(
            f"adapter_config.json: the expression {shown(pattern)} for names of modules cannot be "
            f"used: {error}; list the names of the modules there instead"
        ) from None


def value_of(config: Mapping[str, Any], field: str, module: str, label: str) -> float:
    """`r`, or the alpha, of a module: that of the first key of its pattern that matches, else the
    global one. Raises CheckpointError for what is not a number above zero."""
    patterns = config.get("rank_pattern" if field == "r" else "alpha_pattern") or {}
    value: Any = next(
        (v for key, v in patterns.items() if finds(matches, rf"(.*\.)?({key})$", module)),
        config.get(field),
    )
    if not NUMBER.holds(value) or not value > 0:
        raise CheckpointError(
            f"{label}: {field} of {module} is {shown(value)} in adapter_config.json, and must be a "
            "number above 0; set it there to what the adapter was trained with"
        )
    return float(value)


def start_of(config: Mapping[str, Any]) -> str | None:
    """Why the product is not zero before training, by `init_lora_weights`; None where it is."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_NOT_FROM_ZERO):
        return f"init_lora_weights is {start!r}"
    return None


def drawn_start(config: Mapping[str, Any]) -> str | None:
    """What to say of an adapter that was drawn at random, over a base that stayed as it was."""
    start = config.get("init_weights")
    if config.get("init_lora_weights") is False:
        drawn, what = "init_lora_weights is false: both factors were", "product"
        way_out = "give the adapter before training as `initial_adapter`"
    elif start is False or start in _DRAWN:
        word = "false" if start is False else start
        drawn, what = f"init_weights is {word}: all parameters were", "update"
        way_out = "compare it with BASE+START, START being the adapter before training"
    else:
        return None
    return (
        f"{drawn} drawn at random, so the {what} was not zero before training, and is counted with "
        f"the update; {way_out}"
    )
