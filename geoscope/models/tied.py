"""Which tensors are another tensor under a second name, and so are counted once?

The output head of a model with tied embeddings, stored or not; tensors that share storage in a
pickle, or that were dropped as repeats when a safetensors file was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from geoscope.names import is_embedding, is_output_head, layer_index
from geoscope.records import TensorInfo

__all__ = ["tied_names"]

# Spelling of transformers; used where the head is not stored and so has no name of its own.
_USUAL_HEAD = "lm_head.weight"
_OTHER_EMBEDDING = re.compile(r"wpe|position|token_type|segment")
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def tied_names(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], shared: Mapping[str, str]
) -> dict[str, str]:
    """name → the tensor that it repeats; the name need not be stored."""
    tied = dict(shared)
    head = next(
        (name for name in tensors if is_output_head(name) and _is_matrix(tensors[name])), None
    )
    embedding = _token_embedding(tensors, head)
    if embedding is None:
        return dict(sorted(tied.items()))
    flag = _tie_flag(config)
    if head is None and flag is not False and _has_head(config, known_tied=flag is True):
        tied.setdefault(_USUAL_HEAD, embedding)
    elif head is not None and flag and tensors[head].shape == tensors[embedding].shape:
        tied.setdefault(head, embedding)
    return dict(sorted(tied.items()))


def _token_embedding(tensors: Mapping[str, TensorInfo], head: str | None) -> str | None:
    """The embedding of the head's shape, or the one with most rows; none of positions or types."""
    embeddings = [
        name
        for name, info in tensors.items()
        if is_embedding(name) and _is_matrix(info)
        if layer_index(name) is None and not _OTHER_EMBEDDING.search(name)
    ]
    if head is not None:
        same = [name for name in embeddings if tensors[name].shape == tensors[head].shape]
        embeddings = same or embeddings
    return max(embeddings, key=lambda name: tensors[name].shape[0], default=None)


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2


def _tie_flag(config: Mapping[str, Any]) -> bool | None:
    text = config.get("text_config")
    for where in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(where.get("tie_word_embeddings"), bool):
            return where["tie_word_embeddings"]
    return None


def _has_head(config: Mapping[str, Any], *, known_tied: bool) -> bool:
    """Whether the architecture has an output head; where none is named, a tie speaks for one."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return known_tied
    return any(str(name).endswith(_HEADED) for name in names)
