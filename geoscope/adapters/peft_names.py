"""Under which name does PEFT look for a matrix that a file calls by another?

A key of an adapter is `base_model.model.<module path of the live model>.lora_A.weight`. The path is
mostly the name on disk without `.weight`. It differs for checkpoints of a bare backbone (`h.0.…`
for `transformer.h.0.…`), and for multimodal models, whose files keep the names of transformers 4.
The tables follow transformers 5.23 (`conversion_mapping.py`); a family that is not in them is told.

Experts have two styles: a key for each expert's matrix, as the files name them, which PEFT itself
converts where the live model stacks its experts; and `target_parameters`, whose factors are stacked
as the parameters are (docs/formats.md#adapters).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import first_names
from geoscope.names import is_output_head

__all__ = [
    "ModulePaths",
    "dropped_names",
    "expert_findings",
    "expert_name",
    "lora_keys",
    "module_paths",
    "parameter_keys",
    "stack_experts",
    "stack_findings",
    "unstack_experts",
    "whole_key",
]

_PREFIX = "base_model.model."

# Model type → attribute that holds the backbone in the model with a head; the others: `model`.
_BACKBONES = {
    **dict.fromkeys(
        (
            *("bloom", "codegen", "ctrl", "dbrx", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode"),
            *("gpt_neo", "gptj", "mpt", "openai-gpt", "xlm", "xlnet"),
        ),
        "transformer",
    ),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), "backbone"),
    **dict.fromkeys(("biogpt", "cpmant", "gpt_neox", "gpt_neox_japanese", "reformer", "rwkv"), ""),
}

# How names of a multimodal file become those of the live model; the first rule that fits is used.
_Rules = tuple[tuple[re.Pattern[str], str], ...]
_LLAVA: _Rules = (
    (re.compile(r"^language_model\.(?=lm_head(?:\.|$))"), ""),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (
        re.compile(
            r"^(?=(?:language_model|vision_tower|vision_model|multi_modal_projector|image_newline"
            r"|image_tower|video_tower)(?:\.|$))"
        ),
        "model.",
    ),
)
_QWEN2_VL: _Rules = (
    (re.compile(r"^(?=visual\.)"), "model."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)
_MULTIMODAL: dict[str, _Rules] = {
    **dict.fromkeys(
        (
            *("aria", "aya_vision", "fuyu", "gemma3", "got_ocr2", "internvl", "llava"),
            *("llava_next", "llava_next_video", "llava_onevision", "mistral3", "mllama"),
            *("paligemma", "video_llava", "vipllava"),
        ),
        _LLAVA,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL),
    # Files and live models agree.
    **dict.fromkeys(
        (
            *("gemma3n", "glm4v", "glm4v_moe", "idefics2", "idefics3", "llama4", "qwen3_5"),
            *("qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm"),
        ),
        (),
    ),
}
_OTHER_SENSES = ("vision_config", "audio_config", "text_config")

_EXPERT = re.compile(r"(?P<container>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>[^.]+)")
# Two matrices of each expert that the live model holds as one parameter, and the other one.
_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class ModulePaths:
    """paths: name on disk → path of the module in the live model. notes: one-line remarks."""

    paths: Mapping[str, str]
    notes: tuple[str, ...] = ()


def module_paths(names: Collection[str], config: Mapping[str, Any]) -> ModulePaths:
    """The live paths of a checkpoint's parameters, for the model with its output head.

    names: all parameters of the checkpoint, for a bare backbone is told by what is not there.
    config: config.json; {} when there is none.

    >>> dict(module_paths(["h.0.attn.c_attn.weight"], {"model_type": "gpt2"}).paths)
    {'h.0.attn.c_attn.weight': 'transformer.h.0.attn.c_attn'}
    """
    family = config.get("model_type")
    modules = {name: name.removesuffix(".weight") for name in names}
    if family in _MULTIMODAL:
        rules = _MULTIMODAL[family]
        return ModulePaths({name: _renamed(path, rules) for name, path in modules.items()})
    if any(isinstance(config.get(part), Mapping) for part in _OTHER_SENSES):
        note = (
            f"unknown family {family!r}, disk names used as module paths; verify-adapter "
            "`with_peft` shows whether they are right"
        )
        return ModulePaths(modules, (note,))
    return _with_backbone(modules, family)


def _renamed(path: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, path, count=1)
        if count:
            return renamed
    return path


def _with_backbone(modules: Mapping[str, str], family: Any) -> ModulePaths:
    backbone = _backbone(modules.values(), family)
    if any(path.startswith(f"{backbone}.") for path in modules.values()):
        return ModulePaths(modules)
    if not any(_starts_with_blocks(path) for path in modules.values()):
        note = f"unknown family {family!r}, disk names used as module paths"
        return ModulePaths(modules, (note,))
    paths = {
        name: path if is_output_head(name) else f"{backbone}.{path}"
        for name, path in modules.items()
    }
    note = f"weights of a bare backbone: its modules are {backbone}.… in the model with a head"
    return ModulePaths(paths, (note,))


def _backbone(paths: Collection[str], family: Any) -> str:
    if isinstance(family, str):
        return _BACKBONES.get(family, "model") or family
    return "transformer" if any(path.startswith("h.") for path in paths) else "model"


def _starts_with_blocks(path: str) -> bool:
    return re.match(r"(?:decoder\.)?(?:layers|h|blocks)\.\d+\.", path) is not None


# Blocks of the language model, and those that predict further tokens under a name of their own.
_NUMBERED = re.compile(
    r"^(?:(?:model|transformer|language_model|text_model|gpt_neox|backbone)\.)*(?:layers|h)\.(\d+)\."
)
_FURTHER_TOKENS = re.compile(r"(?:^|[._])(?:mtp|nextn|mtp_\w+|nextn_\w+|eagle)\.")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def dropped_names(names: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters of a file that the live model of transformers has not: blocks of multi-token
    prediction, numbered from `num_hidden_layers` on or named so.

    >>> dropped_names(["model.layers.1.mlp.up_proj.weight"], {"num_hidden_layers": 1})
    ('model.layers.1.mlp.up_proj.weight',)
    """
    text = config.get("text_config")
    sides = [text] if isinstance(text, Mapping) else []
    counts = [
        side[key] for side in (*sides, config) for key in _COUNTS if type(side.get(key)) is int
    ]

    def is_dropped(name: str) -> bool:
        block = _NUMBERED.match(name)
        is_beyond = block is not None and bool(counts) and int(block[1]) >= counts[0]
        return is_beyond or _FURTHER_TOKENS.search(name) is not None

    return tuple(name for name in names if is_dropped(name))


def lora_keys(path: str) -> tuple[str, str]:
    """Keys of A (r, in) and B (out, r) of a module in `adapter_model.safetensors`."""
    return f"{_PREFIX}{path}.lora_A.weight", f"{_PREFIX}{path}.lora_B.weight"


def expert_name(stack: str, expert: int) -> str:
    """How one expert's module of a stack is called.

    >>> expert_name("model.layers.0.mlp.experts.down_proj", 3)
    'model.layers.0.mlp.experts.3.down_proj'
    """
    holder, _, leaf = stack.rpartition(".")
    return f"{holder}.{expert}.{leaf}"


def whole_key(name: str) -> str:
    """Key of a tensor of the base that an adapter replaces whole."""
    return f"{_PREFIX}{name}"


# --- experts --------------------------------------------------------------------------------------


def expert_findings(adapted: Collection[str], every: Collection[str]) -> tuple[str, ...]:
    """Why PEFT on transformers 5 cannot load per-expert keys for these modules, a line each.

    The live model holds the experts of a block as two stacked parameters, and PEFT takes every
    entry of target_modules that ends in the name of an expert's matrix for them: so all experts are
    adapted or none, gate with up, both with down, and no other module of those names.
    adapted, every: module paths, as for `target_modules`.
    """
    experts = {path for path in every if _EXPERT.fullmatch(path)}
    if not experts:
        return ()
    leaves = {path.rpartition(".")[2] for path in experts}
    chosen = set(adapted)
    found: list[str] = []
    for leaf in sorted(leaves):
        of_leaf = {path for path in experts if path.endswith(f".{leaf}")}
        left = sorted(of_leaf - chosen)
        if left and len(left) < len(of_leaf):
            found.append(
                f"{len(left)} of {len(of_leaf)} {leaf} of experts are not adapted "
                f"({first_names(left, 1)}): the live model stacks them; adapt all or none"
            )
    adapted_leaves = {path.rpartition(".")[2] for path in experts & chosen}
    for *fused, last in _PARTS:
        lacking = [leaf for leaf in fused if leaf not in adapted_leaves]
        if 0 < len(lacking) < len(fused):
            found.append(
                f"experts are adapted without {lacking[0]}: the live model holds "
                f"{' and '.join(fused)} as one parameter; adapt both or none"
            )
        elif not lacking and last not in adapted_leaves:
            found.append(
                f"experts are adapted without {last}: PEFT looks for {' and '.join(fused)} in a "
                f"place that only exists beside it; adapt {last}, too"
            )
    namesakes = sorted(path for path in chosen - experts if path.rpartition(".")[2] in leaves)
    if namesakes:
        found.append(
            f"{first_names(namesakes)} cannot be adapted beside experts of the same name: PEFT "
            "takes the name for the stacked experts; leave it out"
        )
    return tuple(found)


def stack_findings(adapted: Collection[str], stacks: Collection[str]) -> tuple[str, ...]:
    """Why PEFT on transformers 5 cannot load modules beside stacked experts, a line each.

    It takes every entry of target_modules that ends in the name of an expert's matrix for the
    stacks. adapted: module paths; stacks: paths of the adapted parameters.
    """
    leaves = {leaf for parts in _PARTS for leaf in parts} if stacks else set()
    namesakes = sorted(path for path in adapted if path.rpartition(".")[2] in leaves)
    if not namesakes:
        return ()
    return (
        f"{first_names(namesakes)} cannot be adapted beside stacked experts: PEFT takes the name "
        "for theirs; leave it out with `exclude`",
    )


def parameter_keys(container: str, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Keys of A and B of stacked parameters: name of the parameter → (key of A, key of B).

    container: path of the module (`model.layers.0.mlp.experts`); names: its adapted parameters in
    the order in which the module has them (gate_up_proj, down_proj). PEFT wraps the module once for
    each, the first innermost.
    """
    last = len(names) - 1
    return {
        name: lora_keys(container + ".base_layer" * (last - place))
        for place, name in enumerate(names)
    }


def stack_experts(A: Sequence[Tensor], B: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of E experts as those of their stacked parameter, as PEFT from 0.19 on packs them.

    A: E times (r, in) → (E·r, in), rows expert by expert, e·r + j. B: E times (out, r) →
    (out, r·E), columns rank by rank, j·E + e. ΔW_e = s·B[:, e::E] @ A[e·r : (e+1)·r].
    """
    stacked = torch.stack(list(B), dim=-1)  # (out, r, E)
    return torch.cat(list(A)), stacked.flatten(1).contiguous()


def unstack_experts(A: Tensor, B: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """A and B of each expert, contiguous: the inverse of `stack_experts`."""
    columns = B.unflatten(1, (-1, experts)).unbind(-1)
    return [(a, b.contiguous()) for a, b in zip(A.chunk(experts), columns, strict=True)]
