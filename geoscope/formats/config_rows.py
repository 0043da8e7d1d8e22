"""How many rows does config.json ask of a weight? For shards that do not tell the whole shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geoscope.names import is_embedding, is_output_head, layer_index

__all__ = ["expected_rows"]


def expected_rows(name: str, config: Mapping[str, Any]) -> int | None:
    """Rows of a projection, norm or embedding in the names of Llama, Qwen and their kin.

    None for any other name, and where config.json has not the field.

    >>> expected_rows("model.layers.0.mlp.up_proj.weight", {"intermediate_size": 12})
    12
    """
    module, _, leaf = name.rpartition(".")
    kind = module.rpartition(".")[2]
    if leaf not in ("weight", "bias"):
        return None
    if layer_index(name) is None and (is_embedding(name) or is_output_head(name)):
        return _size(config, "vocab_size")
    if kind in ("gate_proj", "up_proj"):
        return _size(config, "intermediate_size") if "experts" not in name else None
    if kind in ("q_norm", "k_norm"):
        return _head(config)
    if kind in ("q_proj", "k_proj", "v_proj"):
        heads = _size(config, "num_attention_heads")
        if kind != "q_proj":
            heads = _size(config, "num_key_value_heads") or heads
        size = _head(config)
        return heads * size if heads and size else None
    is_norm = kind == "norm" or kind.endswith("layernorm")
    return _size(config, "hidden_size") if is_norm or kind in ("o_proj", "down_proj") else None


def _head(config: Mapping[str, Any]) -> int | None:
    given = _size(config, "head_dim")
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    return given or (hidden // heads if heads and hidden else None)


def _size(config: Mapping[str, Any], field: str) -> int | None:
    value = config.get(field)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
