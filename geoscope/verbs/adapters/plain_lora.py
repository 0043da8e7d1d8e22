"""A plain LoRA made of a trained one: its config, its tensors, what it carries over unchanged."""

from __future__ import annotations

from typing import Any

from geoscope._version import __version__
from geoscope.adapters.conversion import alpha_for
from geoscope.adapters.peft_config import adapter_config
from geoscope.adapters.peft_names import lora_keys
from geoscope.errors import CheckpointError, first_names
from geoscope.formats.safetensors_writer import FilePlan, TensorPlan
from geoscope.peft.adapter import Adapter

__all__ = ["carried", "plain_config", "plain_plan", "scaling_of_all"]

# What a converted config keeps of the trained one where it is set, beside ranks and targets. The
# rest of a config says how training began or ran.
_KEPT = (
    "auto_mapping",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
)


def scaling_of_all(adapter: Adapter) -> float:
    """The global one, which the modules share after a compression."""
    return next(iter(adapter.modules.values())).scaling


def plain_config(
    end: Adapter, rank: int | None, reference: str | None, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json: the keys of a plain LoRA, sorted, none of our own."""
    was = end.config
    use_rslora = bool(was.get("use_rslora"))
    growth = 2**0.5 if use_rslora else 2  # of alpha where the rank doubles
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    if rank is None:
        r, alpha = 2 * int(was["r"]), growth * was["lora_alpha"]
        for key, value in (was.get("rank_pattern") or {}).items():
            patterns["rank_pattern"][key] = 2 * value
        for key, value in (was.get("alpha_pattern") or {}).items():
            patterns["alpha_pattern"][key] = _number(growth * value)
    else:
        r, alpha = rank, alpha_for(scaling_of_all(end), rank, use_rslora=use_rslora)
    targets = was.get("target_modules") or ()
    config = adapter_config(
        base=reference,
        rank=r,
        alpha=_number(alpha),
        targets=() if isinstance(targets, str) else targets,
        revision=revision,
        fan_in_fan_out=bool(was.get("fan_in_fan_out")),
        parameters=was.get("target_parameters") or (),
    )
    # the version tells how stacks of experts are packed
    versions = ("peft_version",) if any(module.is_stack for module in end.modules.values()) else ()
    kept = {key: was[key] for key in (*_KEPT, *versions) if was.get(key)}
    expression = {"target_modules": targets} if isinstance(targets, str) else {}
    changed = {"task_type": was.get("task_type"), "use_rslora": use_rslora, **patterns}
    return dict(sorted({**config, **kept, **expression, **changed}.items()))


def _number(value: float) -> int | float:
    """As an integer where it is one, which older readers of lora_alpha expect."""
    near = round(value)
    return near if abs(value - near) <= 1e-12 * abs(value) else float(value)


def carried(end: Adapter) -> tuple[str, ...]:
    """Tensors beside the factors that mean the same on the original base: modules_to_save."""
    saved = end.config.get("modules_to_save") or ()
    strange = [
        name
        for name in end.others
        if ".base_layer." in name
        or ".original_module." in name
        or not any(f".{one}." in f".{name}" for one in saved)
    ]
    if strange:
        raise CheckpointError(
            f"{end.given}: {len(strange)} tensors are neither factors nor of modules_to_save: "
            f"{first_names(strange)}; save the adapter again with PeftModel.save_pretrained"
        )
    return end.others


def plain_plan(end: Adapter, rank: int | None, others: tuple[str, ...]) -> FilePlan:
    tensors: dict[str, TensorPlan] = {}
    for module in end.modules.values():
        r = (2 * module.rank if rank is None else rank) * module.experts
        key_A, key_B = lora_keys(module.path)
        m, n = module.shape[::-1] if module.is_turned else module.shape
        tensors[key_A] = TensorPlan("float32", (r, n))
        tensors[key_B] = TensorPlan("float32", (m, r))
    for name in others:
        tensors[name] = TensorPlan(end.tensors[name].dtype, end.tensors[name].shape)
    return FilePlan(tensors, {"geoscope_version": __version__})
