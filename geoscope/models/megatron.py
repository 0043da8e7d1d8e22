"""What are the tensors of a Megatron checkpoint (torch_dist) called in the model of transformers?

Megatron keeps the layers in one stack, and in it what it computes at once:

    decoder.layers.self_attention.linear_qkv.weight     (L, G·(Q + 2)·D, H)    for each of G groups
                                                        Q heads of q, one of k, one of v
    decoder.layers.mlp.linear_fc1.weight                (L, 2·I, H)            gate, then up
    decoder.layers.mlp.experts.experts.linear_fc1.weight (L, E, 2·I, H)        of each expert

or each layer by itself (decoder.layers.7.…), each expert too (…experts.experts.3.…), and the halves
apart (linear_fc1.weight_w, weight_v). Each part becomes a view under the name that Qwen2, Qwen3,
Qwen3-MoE, Llama and GLM have in transformers; what is in no table keeps Megatron's, with the number
of its layer. The heads are those of config.json, or follow from the norm of q. Rows of a vocabulary
that was padded are left out where config.json tells its size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from geoscope.formats.views import Blocks, View
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.fused import text_config
from geoscope.models.tied import tied_names
from geoscope.records import TensorInfo

__all__ = ["ADAPTER", "is_megatron_model", "with_model_names"]

_PREFIX = re.compile(r"^(?:module\.|language_model\.)*")
_LAYER = re.compile(r"^(?P<stack>decoder|mtp)\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.experts\.(?:(?P<expert>\d+)\.)?(?P<rest>.+)$")
# Parts of an adapter of Megatron-Bridge, in place of or beside the weights of the base.
ADAPTER = re.compile(r"\.(?:adapter|to_wrap)\.|\.adapters?\.")

_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": "lm_head.weight",
}
_VOCABULARY = frozenset({"model.embed_tokens.weight", "lm_head.weight"})
# Of a layer, one to one: Megatron's name → the name in transformers.
_INSIDE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.linear_fc2.weight": "mlp.{shared}.down_proj.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
# GLM-4 norms what comes out, too: its norms of what goes in have other names.
_GLM = frozenset({"glm4"})
_GLM_INSIDE = {
    "post_self_attn_layernorm.weight": "post_self_attn_layernorm.weight",
    "post_mlp_layernorm.weight": "post_mlp_layernorm.weight",
}
# Families whose shared expert is one.
_ONE_SHARED = frozenset({"qwen2_moe", "qwen3_next", "qwen3_5_moe"})
_FC1 = re.compile(
    r"^(?P<at>mlp\.(?:shared_experts\.)?)linear_fc1\.(?P<kind>weight|bias)(?P<half>_[wv])?$"
)
_QKV = re.compile(r"^self_attention\.linear_qkv\.(?P<kind>weight|bias)$")
_EXPERT_FC = re.compile(r"^linear_fc(?P<which>[12])\.weight(?P<half>_[wv])?$")
_HALVES = {"_w": "gate_proj", "_v": "up_proj"}


@dataclass(frozen=True)
class _Part:
    """A tensor of the model: rows of one matrix of a stored one."""

    name: str
    blocks: Blocks
    matrix: int


def is_megatron_model(names: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of a GPT model of Megatron."""
    return any(_PREFIX.sub("", name).startswith("decoder.layers.") for name in names)


def with_model_names(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """The checkpoint under the names of transformers.

    shapes: those of the stored tensors, which the checkpoint has as matrices (…·R, C).
    """
    table = _Table(shapes, text_config(checkpoint.config))
    tensors: dict[str, TensorInfo] = {}
    views: dict[str, View] = {}
    for stored, info in checkpoint.tensors.items():
        inner = table.inner(stored)
        rows, columns = (math.prod(inner[:-1]), inner[-1]) if len(inner) > 1 else (*inner, 1)
        for part in table.parts(stored):
            shape = (part.blocks.total, *inner[1:]) if len(inner) < 3 else inner
            size = info.nbytes * math.prod(shape) // max(1, math.prod(info.shape))
            tensors[part.name] = replace(info, name=part.name, shape=shape, nbytes=size)
            views[part.name] = View(stored, rows, columns, part.blocks, 0, part.matrix)
    tensors = dict(sorted(tensors.items()))
    return replace(
        checkpoint,
        tensors=tensors,
        views=views,
        notes=(*checkpoint.notes, *table.notes()),
        tied_to=tied_names(tensors, checkpoint.config, {}),
    )


class _Table:
    """The tables for one checkpoint. whole_qkv: whether some q, k, v could not be told apart."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
        self.shapes, self.config = shapes, config
        self.whole_qkv = False
        self.foreign: set[str] = set()
        self.padding = 0

    def notes(self) -> Iterator[str]:
        """What could not be named, and what was left out."""
        if self.whole_qkv:
            yield (
                "linear_qkv: fused, and without the heads it is not known how; each is one matrix: "
                "copy the model's config.json beside the checkpoint"
            )
        if self.foreign:
            yield f"kept under Megatron's names: {', '.join(sorted(self.foreign))}"
        if self.padding:
            yield f"{self.padding} rows of padding are left out of the vocabulary"

    def inner(self, stored: str) -> tuple[int, ...]:
        """The shape without the sides of layers and experts."""
        layer = _LAYER.match(_PREFIX.sub("", stored))
        if layer is None:
            return self.shapes[stored]
        expert = _EXPERT.match(layer["rest"])
        stacks = (layer["layer"] is None) + (expert is not None and expert["expert"] is None)
        return self.shapes[stored][stacks:]

    def parts(self, stored: str) -> Iterator[_Part]:
        """The tensors of the model in a stored one."""
        name, shape = _PREFIX.sub("", stored), self.shapes[stored]
        layer = _LAYER.match(name)
        if layer is None:
            yield self._outside(name, shape)
            return
        inside = _EXPERT.match(layer["rest"])
        experts = 1
        if inside is not None and inside["expert"] is None:
            experts = shape[1 if layer["layer"] is None else 0]
        count = shape[0] if layer["layer"] is None else 1
        for number in range(count * experts):
            block, expert = divmod(number, experts)
            yield from (
                _Part(leaf, blocks, number)
                for leaf, blocks in self._of_layer(stored, layer, str(block), inside, str(expert))
            )

    def _of_layer(
        self,
        stored: str,
        layer: re.Match[str],
        block: str,
        inside: re.Match[str] | None,
        expert: str,
    ) -> Iterator[tuple[str, Blocks]]:
        """Names and rows of what one matrix of a stack holds."""
        block = layer["layer"] or block
        if layer["stack"] != "decoder":
            yield f"{layer['stack']}.layers.{block}.{layer['rest']}", self._rows(stored)
            return
        if inside is not None:
            parts = self._expert(stored, inside["rest"], inside["expert"] or expert)
        else:
            parts = self._inside(stored, layer["rest"])
        for leaf, blocks in parts:
            yield f"model.layers.{block}.{leaf}", blocks

    def _rows(self, stored: str) -> Blocks:
        """All rows of one matrix of a stack, or all entries of one vector."""
        inner = self.inner(stored)
        return Blocks(0, math.prod(inner[:-1]) if len(inner) > 1 else sum(inner))

    def _outside(self, name: str, shape: tuple[int, ...]) -> _Part:
        known = _OUTSIDE.get(name)
        rows = math.prod(shape[:-1]) if len(shape) > 1 else sum(shape)
        size = self.config.get("vocab_size")
        if known in _VOCABULARY and isinstance(size, int) and 0 < size < rows:
            self.padding, rows = rows - size, size
        if known is None:
            self.foreign.add(name)
        return _Part(known or name, Blocks(0, rows), 0)

    def _inside(self, stored: str, rest: str) -> Iterator[tuple[str, Blocks]]:
        rows, family = self._rows(stored), str(self.config.get("model_type"))
        known = _INSIDE.get(rest) or (_GLM_INSIDE.get(rest) if family in _GLM else None)
        shared = "shared_expert" if family in _ONE_SHARED else "shared_experts"
        if known is not None:
            yield known.format(shared=shared), rows
        elif fc1 := _FC1.match(rest):
            at = fc1["at"].replace("shared_experts", shared)
            for module, blocks in self._gated(stored, fc1["half"], rest):
                yield f"{at}{module}.{fc1['kind']}", blocks
        elif qkv := _QKV.match(rest):
            for module, blocks in self._qkv(stored):
                yield f"self_attn.{module}.{qkv['kind']}", blocks
        else:
            self.foreign.add(rest)
            yield rest, rows

    def _expert(self, stored: str, rest: str, number: str) -> Iterator[tuple[str, Blocks]]:
        match = _EXPERT_FC.match(rest)
        if match is None:
            self.foreign.add(f"mlp.experts.experts.{rest}")
            yield f"mlp.experts.{number}.{rest}", self._rows(stored)
        elif match["which"] == "2":
            yield f"mlp.experts.{number}.down_proj.weight", self._rows(stored)
        else:
            for module, blocks in self._gated(stored, match["half"], rest):
                yield f"mlp.experts.{number}.{module}.weight", blocks

    def _gated(self, stored: str, half: str | None, rest: str) -> Iterator[tuple[str, Blocks]]:
        """Gate, then up; `up_proj` alone where the other matrix has as many columns as it rows."""
        rows = self._rows(stored).total
        if half is not None:
            yield _HALVES[half], Blocks(0, rows)
            return
        second = stored.replace("linear_fc1", "linear_fc2").replace(".bias", ".weight")
        if second in self.shapes and self.shapes[second][-1] == rows:
            yield "up_proj", Blocks(0, rows)
        else:
            yield "gate_proj", Blocks(0, rows // 2)
            yield "up_proj", Blocks(rows // 2, rows // 2)

    def _qkv(self, stored: str) -> Iterator[tuple[str, Blocks]]:
        rows = self._rows(stored).total
        heads, size = self._heads(stored)
        groups = (rows // size - heads) // 2 if size else 0
        if not heads or groups < 1 or heads % groups or (heads + 2 * groups) * size != rows:
            self.whole_qkv = True
            yield "linear_qkv", Blocks(0, rows)
            return
        queries = heads // groups
        stride = (queries + 2) * size
        yield "q_proj", Blocks(0, queries * size, stride, groups)
        yield "k_proj", Blocks(queries * size, size, stride, groups)
        yield "v_proj", Blocks((queries + 1) * size, size, stride, groups)

    def _heads(self, stored: str) -> tuple[int, int]:
        """Heads of q and their size; of config.json, else by the norm of q, which is that of one
        head, and the inputs of linear_proj. Zeros for neither."""
        stem = stored.rpartition("linear_qkv")[0]
        inputs = self.shapes.get(f"{stem}linear_proj.weight", (0,))[-1]
        heads, size = (self.config.get(key) for key in ("num_attention_heads", "head_dim"))
        if isinstance(heads, int) and heads > 0:
            return heads, size if isinstance(size, int) and size > 0 else inputs // heads
        norm = self.shapes.get(f"{stem}q_layernorm.weight", (0,))[-1]
        return (inputs // norm, norm) if norm and inputs % norm == 0 else (0, 0)
