"""Which weights are stored (in, out), as the Conv1D of GPT-2 does, and must be turned?

Known by the model type in config.json and checked by the shape of `c_attn`, which fuses q, k and v:
(n, 3n) is stored (in, out), (3n, n) is (out, in). The shape decides where it can, because copies of
these models with ordinary linear layers keep the names; so it does without a config, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from geoscope.names import layer_index
from geoscope.records import TensorInfo

__all__ = ["is_conv1d", "turned_names"]

_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = re.compile(r"\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")
_FUSED_QKV = re.compile(r"\.c_attn\.weight$")


def is_conv1d(name: str) -> bool:
    """Whether a weight is of a module that is a Conv1D in the models that have such."""
    return _CONV1D.search(name) is not None and layer_index(name) is not None


def turned_names(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names stored (in, out), and a remark when the shape had to say so."""
    candidates = frozenset(
        name for name, info in tensors.items() if len(info.shape) == 2 and is_conv1d(name)
    )
    if not candidates:
        return frozenset(), ()
    by_type = config.get("model_type") in _MODEL_TYPES
    by_shape = _by_shape([tensors[name].shape for name in candidates if _FUSED_QKV.search(name)])
    turned = by_type if by_shape is None else by_shape
    notes = ()
    if turned != by_type:
        stored = "(in, out)" if turned else "(out, in)"
        notes = (f"c_attn and its kind are taken as stored {stored}, from the shape of c_attn",)
    return (candidates if turned else frozenset()), notes


def _by_shape(fused: list[tuple[int, ...]]) -> bool | None:
    """True for (n, 3n), False for (3n, n), None when the shapes do not tell."""
    if fused and all(columns == 3 * rows for rows, columns in fused):
        return True
    if fused and all(rows == 3 * columns for rows, columns in fused):
        return False
    return None
