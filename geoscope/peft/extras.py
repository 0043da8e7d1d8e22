"""What does an adapter change beside its factors? Whole tensors, rows of embeddings, vectors.

lm_head.weight, model.norm.weight               `modules_to_save`, and biases of `bias`: whole
lm_head.modules_to_save.default.weight          the same in a raw state dict
lm_head.original_module.weight                  there, too: the base's own, passed over
model.embed_tokens.base_layer.weight            an adapted embedding, or a resized vocabulary
….embed_tokens.token_adapter.trainable_tokens_delta
    in spite of the name the new rows themselves; which ones, `trainable_token_indices` says
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError
from geoscope.names import without_wrappers
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Read", "Rows", "Vector", "base_name", "replacements", "saved_name", "token_rows"]

Read = Callable[[str], "Tensor"]  # stored name → the tensor as it is stored

_OTHER_MODEL = "give the model that the adapter was trained on"
_MARKS = re.compile(r"\.(?:base_layer|token_adapter|modules_to_save\.[^.]+)(?=\.)")
_SAVED_WHOLE = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
# In a raw state dict: the base's own weight, buffers of PEFT, and scales of a quantised base.
_PASSED_OVER = re.compile(
    r"(?:^|\.)(?:original_module|vera_[AB]|tinylora_[vP]|ranknum|SCB|weight_format)(?:\.|$)|\.weight\."
)
_OF_AN_ADAPTER = re.compile(
    r"(?:^|\.)(?:lora|vera|ia3|hada|lokr|oft|boft|hra|vblora|fourierft|miss|tinylora)_"
)
_ROWS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")


@dataclass(frozen=True)
class Rows:
    """New rows of an embedding. indices: which ones. stored: tensor of (len(indices), dim)."""

    indices: tuple[int, ...]
    stored: str

    def updated(self, name: str, weight: Tensor, read: Read) -> Tensor:
        """The embedding W (vocab, dim) with the new rows, fp64. Raises CheckpointError."""
        rows, changed = read(self.stored).double(), weight.double().clone()
        if rows.shape[1:] != changed.shape[1:] or max(self.indices) >= len(changed):
            raise CheckpointError(
                f"{name}: the base tensor is {tuple(weight.shape)}, the new rows up to number "
                f"{max(self.indices)} are {rows.shape[1]} wide; {_OTHER_MODEL}"
            )
        changed[list(self.indices)] = rows
        return changed


@dataclass(frozen=True)
class Vector:
    """A change of a 1-D tensor b by a stored v: b + scaling·v, or b ⊙ v where it multiplies."""

    stored: str
    scaling: float = 1.0
    multiplies: bool = False

    def updated(self, name: str, weight: Tensor, read: Read) -> Tensor:
        """b′ in fp64. Raises CheckpointError for a b of another length."""
        change, b = read(self.stored).double().reshape(-1), weight.double()
        if change.shape != b.shape:
            raise CheckpointError(
                f"{name}: the base tensor is {tuple(b.shape)}, its change {tuple(change.shape)}; "
                f"{_OTHER_MODEL}"
            )
        return b * change if self.multiplies else b + self.scaling * change


def base_name(stored: str) -> str:
    """Name of the base's tensor that a stored whole tensor stands for.

    >>> base_name("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    return _MARKS.sub("", without_wrappers(stored))


def saved_name(stored: str) -> str:
    """The name under which PEFT saves a whole tensor, without its prefix."""
    return _SAVED_WHOLE.sub("", without_wrappers(stored))


def replacements(
    others: Iterable[str], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, str]:
    """Base tensor → the stored one that replaces it whole; of a quantised base none.

    others: stored names that are no factors. Raises CheckpointError where two replace one, and
    for what is a part of an adapter.
    """
    found: dict[str, str] = {}
    for stored in others:
        is_number = "float" in tensors[stored].dtype
        if not is_number or _PASSED_OVER.search(stored) or is_rows(stored):
            continue
        if _OF_AN_ADAPTER.search(stored):
            raise CheckpointError(
                f"{label}: {stored} belongs to no module of the type that adapter_config.json "
                "names; factors and config are of different saves: copy both again"
            )
        name = base_name(stored)
        if name in found:
            raise CheckpointError(
                f"{label}: {found[name]} and {stored} both replace {name}; "
                "save one adapter in a file"
            )
        found[name] = stored
    return found


def is_rows(stored: str) -> bool:
    """Whether a tensor holds new rows of an embedding."""
    return _ROWS.fullmatch(without_wrappers(stored)) is not None


def token_rows(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, Rows]:
    """Base tensor → its new rows. Raises CheckpointError where the config does not say which."""
    found: dict[str, Rows] = {}
    given = config.get("trainable_token_indices")
    for stored, info in tensors.items():
        match = _ROWS.fullmatch(without_wrappers(stored))
        if match is None:
            continue
        indices = _indices(given, match["path"])
        if len(info.shape) != 2 or indices is None or len(indices) != info.shape[0]:
            counted = "none" if indices is None else f"{len(indices)}"
            raise CheckpointError(
                f"{label}: {stored} is {info.shape}, and trainable_token_indices in "
                f"adapter_config.json has {counted} for it; factors and config are of different "
                "saves: copy both again"
            )
        found[f"{match['path']}.weight"] = Rows(indices, stored)
    if given and not found:
        raise CheckpointError(
            f"{label}: trainable_token_indices are in adapter_config.json and no new rows are "
            "stored; factors and config are of different saves: copy both again"
        )
    return found


def _indices(given: Any, path: str) -> tuple[int, ...] | None:
    """A list is for the input embedding, a table has the names of modules; None without any."""
    if isinstance(given, Mapping):
        suffixes = (key for key in given if path == key or path.endswith(f".{key}"))
        given = given.get(next(suffixes, None))
    is_list = isinstance(given, list) and bool(given)
    if not is_list or not all(type(one) is int and one >= 0 for one in given):
        return None
    return tuple(given)
