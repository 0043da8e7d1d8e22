"""What does `adapter_config.json` say, and what do PEFT and vLLM make of it?

The least set of keys that old and new PEFT load without a warning, in one order, so
that equal input gives equal bytes. `init_lora_weights` is always true: any word there makes the
loader run its own initialisation on the base that is at hand. No keys of ours.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from geoscope.errors import OptionError, first_names
from geoscope.files import encoded

__all__ = [
    "VLLM_RANKS",
    "adapter_config",
    "config_bytes",
    "max_lora_rank",
    "rank_advice",
    "target_modules",
    "vllm_findings",
]

# What `--max-lora-rank` of vLLM may be; verl rounds `lora_rank` up to one of these.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The first PEFT that packs stacked experts as they are packed here.
_PACKING = "0.19.0"
# Above this, adapters get slow to serve and rarely learn more.
_USUAL_RANK = 64


def adapter_config(
    *,
    base: str | None,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    revision: str | None = None,
    fan_in_fan_out: bool = False,
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """The configuration of a plain LoRA, keys in the order of the alphabet.

    base: the folder or Hub id to load the adapter on, None for one in memory; rank and alpha as the
    files have them (a mirror has rank 2r and the alpha of r). targets: see `target_modules`.
    parameters:
    `target_parameters`, for stacked experts; the key is left out where there are none, because PEFT
    before 0.17 does not know it. Beside them `peft_version` tells how their factors are packed.
    """
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": False,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": _PACKING,
        "r": rank,
        "rank_pattern": {},
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(targets),
        "target_parameters": sorted(parameters),
        "use_dora": False,
        "use_rslora": False,
    }
    if not parameters:
        del config["target_parameters"], config["peft_version"]
    return config


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The file: JSON, indented, UTF-8."""
    return encoded(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def target_modules(adapted: Collection[str], every: Collection[str]) -> list[str]:
    """What to write as `target_modules`, so that PEFT finds the adapted modules and no others.

    PEFT takes each entry as a whole path or as what follows a dot: `q_proj` is every module of that
    last part. So a last part stands for its modules only where all of them are adapted; the modules
    of the others are written as full paths.
    adapted: module paths of the live model; every: paths of all its modules, at least of all that
    have a weight (embeddings, heads and norms, too); the modules around them are inferred.
    Raises OptionError where even a full path is the end of another one that is not adapted.
    """
    paths = _with_parents(every) | set(adapted)
    others = paths - set(adapted)
    over_matched = {path.rpartition(".")[2] for path in others}
    targets: set[str] = set()
    for path in adapted:
        leaf = path.rpartition(".")[2]
        targets.add(path if leaf in over_matched else leaf)
    caught = sorted(path for path in others for target in targets if path.endswith(f".{target}"))
    if caught:
        raise OptionError(
            "no target_modules list selects only the adapted modules: "
            f"{first_names(caught)} would be adapted too. Adapt them as well, or leave out the "
            "modules of the same name"
        )
    return sorted(targets)


def _with_parents(paths: Collection[str]) -> set[str]:
    """The paths and the modules that hold them: a target's name may be that of a container."""
    found: set[str] = set()
    for path in paths:
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


# --- vLLM -----------------------------------------------------------------------------------------


def max_lora_rank(rank: int) -> int | None:
    """The least `--max-lora-rank` of vLLM that serves this rank, None where there is none."""
    return next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)


def rank_advice(rank: int) -> str | None:
    """One line where vLLM does not serve a rank as it stands or where it is unusually high."""
    served = max_lora_rank(rank)
    if served is None:
        return f"rank {rank}: vLLM serves {VLLM_RANKS[-1]} at most; choose a smaller rank"
    if rank > _USUAL_RANK:
        return f"rank {rank} is high: vLLM needs --max-lora-rank {served} and gets slower with it"
    if rank != served:
        return f"rank {rank} is not one of vLLM's: it needs --max-lora-rank {served}"
    return None


def vllm_findings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What vLLM would refuse or pass over without a word in an adapter_config.json, a line each."""
    found: list[str] = []
    bias = config.get("bias", "none")
    if bias != "none":
        found.append(f"bias is {bias!r}: vLLM takes 'none' only; train without biases")
    if config.get("use_dora"):
        found.append("use_dora is true: vLLM serves no DoRA; merge it into the base")
    if config.get("modules_to_save"):
        saved = first_names([str(name) for name in config["modules_to_save"]])
        found.append(f"modules_to_save holds {saved}: vLLM takes factors only; merge instead")
    for key, single in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if config.get(key):
            found.append(f"{key} is not empty: vLLM reads {single} alone; write one for all")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        found.append(f"r is {rank!r}: a rank is a whole number from 1 on")
    elif max_lora_rank(rank) is None:
        found.append(f"r is {rank}: vLLM serves {VLLM_RANKS[-1]} at most; compress the adapter")
    if not config.get("lora_alpha"):
        found.append("lora_alpha is 0 or missing: the adapter would do nothing; write it again")
    return tuple(found)
