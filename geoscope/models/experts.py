"""Which matrices are in a stack of experts?

    gate_up_proj (E, 2I, H), down_proj (E, H, I)    Qwen, Mixtral, DeepSeek … live in transformers 5
    gate_up_proj (E, H, 2I), down_proj (E, I, H)    Llama 4, gpt-oss: stored (in, out)

Gate is the first half and up the second; of gpt-oss they alternate. Which of the two orders a stack
has is told by the shapes of both tensors of a layer, which never fit both. Each expert's matrix
gets the name that it has in a checkpoint with an entry for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from geoscope.formats.views import Blocks
from geoscope.models.fused import text_config
from geoscope.records import TensorInfo

__all__ = ["Expert", "expert_parts", "is_stack"]

_STACK = re.compile(
    r"^(?P<block>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)(?P<bias>_bias)?(?:\.weight)?$"
)
_INTERLEAVED = "gpt_oss"


@dataclass(frozen=True)
class Expert:
    """One expert's matrix (or bias) in a stack. blocks: which of its outputs; turned: whether they
    are columns of the file.
    """

    name: str
    number: int
    blocks: Blocks
    turned: bool


def is_stack(name: str) -> bool:
    """Whether a name is that of stacked experts, or of their biases."""
    return _STACK.match(name) is not None


def expert_parts(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> list[Expert]:
    """The matrices of a stack, expert by expert; none where the shapes do not tell how it lies."""
    match = _STACK.match(info.name)
    if match is None or 0 in info.shape:
        return []
    block, leaf, is_bias = match["block"], match["leaf"], match["bias"] is not None
    if len(info.shape) != (2 if is_bias else 3):
        return []
    turned = is_bias or _is_turned(info, _other(match, tensors))
    if turned is None:
        return []
    out = info.shape[-1] if turned else info.shape[1]
    interleaved = _is_interleaved(block, tensors, config)
    kind = "bias" if is_bias else "weight"
    return [
        Expert(f"{block}.{number}.{module}.{kind}", number, blocks, turned)
        for number in range(info.shape[0])
        for module, blocks in _modules(leaf, out, interleaved=interleaved)
    ]


def _modules(leaf: str, out: int, *, interleaved: bool) -> Iterator[tuple[str, Blocks]]:
    if leaf == "down_proj":
        yield "down_proj", Blocks(0, out)
    elif out % 2 == 0:
        half = out // 2
        for i, module in enumerate(("gate_proj", "up_proj")):
            yield module, Blocks(i, 1, 2, half) if interleaved else Blocks(i * half, half)


def _other(match: re.Match[str], tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The other stack of the same block."""
    leaf = "down_proj" if match["leaf"] == "gate_up_proj" else "gate_up_proj"
    names = (f"{match['block']}.{leaf}", f"{match['block']}.{leaf}.weight")
    return next((tensors[name] for name in names if name in tensors), None)


def _is_turned(info: TensorInfo, other: TensorInfo | None) -> bool | None:
    """True for (E, H, 2I) and (E, I, H), False for (E, 2I, H) and (E, H, I), None for neither."""
    if other is None or len(other.shape) != 3 or other.shape[0] != info.shape[0]:
        return None
    wide, down = (info, other) if ".gate_up_proj" in info.name else (other, info)
    (_, a, b), (_, c, d) = wide.shape, down.shape
    if (a, b) == (2 * d, c):
        return False
    return True if (b, a) == (2 * c, d) else None


def _is_interleaved(
    block: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> bool:
    family = text_config(config).get("model_type")
    if family is None:  # one file alone: gpt-oss is the family whose experts have biases
        return f"{block}.gate_up_proj_bias" in tensors
    return family == _INTERLEAVED
