"""Where are q, k and v, gate and up, in a weight that holds several of them?

    blocks one after the other    Phi-3 qkv_proj, gate_up_proj; GLM gate_up_proj; MPT Wqkv;
                                  GPT-2 c_attn; vision blocks of Qwen-VL and GLM-V
    (q, k, v) for each head       GPT-NeoX, BLOOM, Persimmon, old Falcon without multi-query
    (q …, k, v) for each group    Falcon of the new architecture; with multi-query one group

Read in the modelling code of transformers 5.23.0; the number of heads comes from config.json. A
family that is not here keeps one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from geoscope.formats.views import Blocks
from geoscope.records import TensorInfo

__all__ = ["FUSED", "Parts", "fused_parts", "text_config"]

# Module of the part → its rows (out) in the fused weight.
Parts = Mapping[str, Blocks]
_Rule = Callable[[int, Mapping[str, Any]], Parts | None]

FUSED = re.compile(
    r"(?:^|\.)(?P<leaf>qkv_proj|query_key_value|c_attn|Wqkv|qkv|gate_up_proj)\.(?:weight|bias)$"
)
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


def fused_parts(info: TensorInfo, config: Mapping[str, Any]) -> tuple[str, Parts] | None:
    """The module's own name and its parts; None for a weight that stays whole.

    None, too, where the sides are not those that config.json tells.
    """
    match = FUSED.search(info.name)
    is_flat = len(info.shape) in (1, 2)
    if match is None or not is_flat:
        return None
    leaf, out = match["leaf"], info.shape[0]
    rule = _rule(leaf, info, config)
    parts = None if rule is None else rule(out, text_config(config))
    if parts is None or sum(part.total for part in parts.values()) != out:
        return None
    return (leaf, parts) if all(part.fits(out) for part in parts.values()) else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that is about the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and text else config


def _rule(leaf: str, info: TensorInfo, config: Mapping[str, Any]) -> _Rule | None:
    family = config.get("model_type")
    if leaf == "qkv":
        return _thirds if family in _VISION_THIRDS else None
    if family is None and leaf == "c_attn":
        # Stored (in, out), which only GPT-2 and its kin do; a bias goes with its weight.
        return _c_attn if info.transposed or len(info.shape) == 1 else None
    return _RULES.get((str(text_config(config).get("model_type", family)), leaf))


def _in_turn(names: tuple[str, ...], sizes: tuple[int, ...]) -> Parts:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        name: Blocks(start, size) for name, start, size in zip(names, starts, sizes, strict=True)
    }


def _thirds(out: int, _: Mapping[str, Any]) -> Parts | None:
    return None if out % 3 else _in_turn(_QKV, (out // 3,) * 3)


def _halves(out: int, _: Mapping[str, Any]) -> Parts | None:
    return None if out % 2 else _in_turn(_GATE_UP, (out // 2,) * 2)


def _c_attn(out: int, config: Mapping[str, Any]) -> Parts | None:
    """Of cross-attention only k and v are fused; the width tells which it is."""
    width = config.get("n_embd", config.get("hidden_size"))
    if isinstance(width, int) and out == 2 * width:
        return _in_turn(_QKV[1:], (width, width))
    return _thirds(out, config)


def _grouped_blocks(out: int, config: Mapping[str, Any]) -> Parts | None:
    """Rows of q, then of k, then of v, with fewer heads of k and v."""
    heads = _count(config, "num_attention_heads")
    shared = _count(config, "num_key_value_heads") or heads
    if not heads or out % (heads + 2 * shared):
        return None
    dim = out // (heads + 2 * shared)
    return _in_turn(_QKV, (heads * dim, shared * dim, shared * dim))


def _by_head(out: int, config: Mapping[str, Any]) -> Parts | None:
    return _by_group(out, _count(config, "num_attention_heads", "n_head"), 1)


def _falcon(out: int, config: Mapping[str, Any]) -> Parts | None:
    heads = _count(config, "num_attention_heads", "n_head")
    if config.get("new_decoder_architecture"):
        groups = _count(config, "num_kv_heads", "n_head_kv") or heads
        return None if not groups or heads % groups else _by_group(out, groups, heads // groups)
    if config.get("multi_query", True):
        return _by_group(out, 1, heads)
    return _by_group(out, heads, 1)


def _by_group(out: int, groups: int, queries: int) -> Parts | None:
    """For each group `queries` heads of q, one of k, one of v."""
    if not groups or not queries or out % (groups * (queries + 2)):
        return None
    group = out // groups
    dim = group // (queries + 2)
    return {
        "q_proj": Blocks(0, queries * dim, group, groups),
        "k_proj": Blocks(queries * dim, dim, group, groups),
        "v_proj": Blocks((queries + 1) * dim, dim, group, groups),
    }


def _count(config: Mapping[str, Any], *keys: str) -> int:
    """The first of some keys that holds a whole number; 0 without one."""
    found = (config.get(key) for key in keys)
    return next((one for one in found if isinstance(one, int) and one > 0), 0)


_VISION_THIRDS = frozenset(
    {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe"}
)
_RULES: dict[tuple[str, str], _Rule] = {
    ("phi3", "qkv_proj"): _grouped_blocks,
    ("phi3", "gate_up_proj"): _halves,
    ("glm", "gate_up_proj"): _halves,
    ("glm4", "gate_up_proj"): _halves,
    ("glm4v_text", "gate_up_proj"): _halves,
    ("gpt_neox", "query_key_value"): _by_head,
    ("bloom", "query_key_value"): _by_head,
    ("persimmon", "query_key_value"): _by_head,
    ("falcon", "query_key_value"): _falcon,
    ("mpt", "Wqkv"): _thirds,
    ("gpt2", "c_attn"): _c_attn,
    ("openai-gpt", "c_attn"): _c_attn,
    ("imagegpt", "c_attn"): _c_attn,
    ("decision_transformer", "c_attn"): _c_attn,
}
