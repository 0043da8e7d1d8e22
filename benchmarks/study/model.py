"""A small transformer as a function of its weights, which are a plain mapping of tensors.

RMS norms, causal attention, SwiGLU, learned positions, untied head; names as Llama has them. A
function of a mapping, because the weights of an adapter are made anew from its factors at every
step: of matrices this small that costs less than a second path for each token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.study.tasks import EOS, PAD, TOKENS

__all__ = ["MATRICES", "Cache", "Size", "complete", "logits", "matrix_names", "new_weights"]

Weights = Mapping[str, Tensor]
Cache = list[tuple[Tensor, Tensor]]

MATRICES = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class Size:
    """Shape of the model: layers, width, width of the MLP, heads, most tokens of a sequence."""

    layers: int = 2
    hidden: int = 64
    inner: int = 160
    heads: int = 4
    length: int = 24

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Part of a block → (out, in)."""
        square, up = (self.hidden, self.hidden), (self.inner, self.hidden)
        down = (self.hidden, self.inner)
        return dict(zip(MATRICES, (*[square] * 4, up, up, down), strict=True))


def _block(layer: int) -> str:
    return f"model.layers.{layer}"


def matrix_names(size: Size) -> list[str]:
    """Names of the matrices in blocks, without `.weight`."""
    return [f"{_block(layer)}.{part}" for layer in range(size.layers) for part in MATRICES]


def new_weights(size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """Freshly drawn weights in float32: N(0, 1/in), outputs of blocks smaller by √(2·layers)."""

    def drawn(rows: int, columns: int, scale: float) -> Tensor:
        return scale * torch.randn(rows, columns, generator=generator)

    weights = {
        "model.embed_tokens.weight": drawn(TOKENS, size.hidden, 1.0),
        "model.embed_positions.weight": drawn(size.length, size.hidden, 0.5),
        "lm_head.weight": drawn(TOKENS, size.hidden, size.hidden**-0.5),
        "model.norm.weight": torch.ones(size.hidden),
    }
    for layer in range(size.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{_block(layer)}.{norm}.weight"] = torch.ones(size.hidden)
        for part, (rows, columns) in size.shapes.items():
            last = part in ("self_attn.o_proj", "mlp.down_proj")
            scale = columns**-0.5 / (math.sqrt(2 * size.layers) if last else 1.0)
            weights[f"{_block(layer)}.{part}.weight"] = drawn(rows, columns, scale)
    return weights


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, 1e-6)


def _attention(
    weights: Weights, name: str, x: Tensor, size: Size, past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    count, length, _ = x.shape
    q, k, v = (
        functional.linear(x, weights[f"{name}.{part}_proj.weight"])
        .view(count, length, size.heads, -1)
        .transpose(1, 2)
        for part in "qkv"
    )
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
    joined = mixed.transpose(1, 2).reshape(count, length, -1)
    return functional.linear(joined, weights[f"{name}.o_proj.weight"]), (k, v)


def _mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    gate, up = (
        functional.linear(x, weights[f"{name}.{part}_proj.weight"]) for part in ("gate", "up")
    )
    return functional.linear(functional.silu(gate) * up, weights[f"{name}.down_proj.weight"])


def logits(
    weights: Weights, tokens: Tensor, size: Size, past: Cache | None = None
) -> tuple[Tensor, Cache]:
    """Logits (n, t, tokens) of sequences (n, t), and the keys and values of all layers.

    past: those of the tokens before; then `tokens` is one column.
    """
    start = 0 if past is None else past[0][0].shape[2]
    positions = weights["model.embed_positions.weight"][start : start + tokens.shape[1]]
    x = functional.embedding(tokens, weights["model.embed_tokens.weight"]) + positions
    cache: Cache = []
    for layer in range(size.layers):
        block = _block(layer)
        inner = _norm(x, weights[f"{block}.input_layernorm.weight"])
        added, keys = _attention(
            weights, f"{block}.self_attn", inner, size, None if past is None else past[layer]
        )
        cache.append(keys)
        x = x + added
        x = x + _mlp(
            weights, f"{block}.mlp", _norm(x, weights[f"{block}.post_attention_layernorm.weight"])
        )
    return functional.linear(
        _norm(x, weights["model.norm.weight"]), weights["lm_head.weight"]
    ), cache


@torch.no_grad()
def complete(
    weights: Weights,
    prompts: Tensor,
    length: int,
    size: Size,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Completions (n·samples, length) and the entropy (nats) at each of their tokens.

    Sampled at temperature 1; greedy without a generator. A prompt is read once for all its samples.
    What follows an end-of-sequence token is padding.
    """
    scores, cache = logits(weights, prompts, size)
    cache = [(k.repeat_interleave(samples, 0), v.repeat_interleave(samples, 0)) for k, v in cache]
    last = scores[:, -1].repeat_interleave(samples, 0)
    finished = torch.zeros(len(last), 1, dtype=torch.bool, device=last.device)
    tokens, entropies = [], []
    for place in range(length):
        logprobs = last.log_softmax(dim=-1)
        entropies.append(-(logprobs.exp() * logprobs).sum(dim=-1))
        token = _chosen(logprobs, generator).masked_fill(finished, PAD)
        finished = finished | (token == EOS)
        tokens.append(token)
        if place < length - 1:
            scores, cache = logits(weights, token, size, cache)
            last = scores[:, -1]
    return torch.cat(tokens, dim=1), torch.stack(entropies, dim=1)


def _chosen(logprobs: Tensor, generator: torch.Generator | None) -> Tensor:
    """The likeliest token of each row, or one drawn by the Gumbel trick from the CPU's stream."""
    if generator is None:
        return logprobs.argmax(dim=-1, keepdim=True)
    uniform = torch.rand(logprobs.shape, generator=generator).clamp_min(1e-20).to(logprobs.device)
    return (logprobs - (-uniform.log()).log()).argmax(dim=-1, keepdim=True)
