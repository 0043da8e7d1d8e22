"""Families of models whose tree is known: state dicts, each made from its parent by an update."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geoscope.linalg.changes import side
from geoscope.linalg.displacements import displacement_gram
from geoscope.metrics.kin import Kin

__all__ = ["KINDS", "Case", "Updates", "drawn", "kin_between", "merged", "simulated", "tuned"]

SHAPES = {"self_attn.q_proj": (48, 48), "mlp.up_proj": (96, 48), "mlp.down_proj": (48, 96)}
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Updates:
    """How a child is made.

    size: ‖ΔW‖/‖W‖. rank: of the update; None for a full one. decay: of the weights, relative.
    along: weights of other updates, by their state dicts, that this one shares: ΔW is that share
    of theirs and the rest its own.
    """

    size: float = 0.03
    rank: int | None = None
    decay: float = 0.0
    like: tuple[Mapping[str, Tensor], float] | None = None


def drawn(
    seed: int, *, layers: int = 6, dtype: torch.dtype = torch.float32, head: bool = True
) -> Weights:
    """A model of Gaussian matrices, embedding, norm and output head."""
    made = torch.Generator().manual_seed(seed)
    weights = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=made) * 0.05
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }
    weights["model.embed_tokens.weight"] = torch.randn(80, 48, generator=made) * 0.05
    weights["model.norm.weight"] = torch.ones(48)
    if head:
        weights["lm_head.weight"] = torch.randn(80, 48, generator=made) * 0.05
    return {name: weight.to(dtype) for name, weight in weights.items()}


def tuned(
    parent: Mapping[str, Tensor],
    seed: int,
    how: Updates = Updates(),
    *,
    dtype: torch.dtype | None = None,
) -> Weights:
    """A child: each matrix of a block W(1 − decay) + ΔW, stored in the parent's dtype."""
    made = torch.Generator().manual_seed(seed)
    return {
        name: _child(weight, name, made, how).to(dtype or weight.dtype)
        if ".layers." in name
        else weight.to(dtype or weight.dtype).clone()
        for name, weight in parent.items()
    }


def _child(weight: Tensor, name: str, made: torch.Generator, how: Updates) -> Tensor:
    W = weight.double()
    m, n = W.shape
    update = torch.randn(m, n, generator=made, dtype=torch.float64)
    if how.rank is not None:
        left = torch.randn(m, how.rank, generator=made, dtype=torch.float64)
        update = left @ torch.randn(how.rank, n, generator=made, dtype=torch.float64)
    update *= how.size * W.norm() / update.norm()
    if how.like is not None:
        other, share = how.like
        shared = other[name].double() - W
        update = (1 - share**2) ** 0.5 * update + share * update.norm() / shared.norm() * shared
    return W * (1 - how.decay) + update


def merged(parts: Iterable[tuple[float, Mapping[str, Tensor]]], dtype: torch.dtype) -> Weights:
    """Σ weight · model in fp32, stored in a dtype."""
    members = list(parts)
    return {
        name: torch.stack([weight * model[name].float() for weight, model in members])
        .sum(0)
        .to(dtype)
        for name in members[0][1]
    }


def kin_between(model: Mapping[str, Tensor], candidates: Sequence[Mapping[str, Tensor]]) -> Kin:
    """What all matrices of blocks tell, each in a format of its own and on no grid."""
    names = [name for name in model if ".layers." in name]
    every = [model, *candidates]
    sides = [[side(weights[name]) for weights in every] for name in names]
    bits = torch.tensor([[each.fmt.fraction_bits for each in row] for row in sides])
    noise = torch.tensor([[each.noise**2 for each in row] for row in sides], dtype=torch.float64)
    own, others = bits[:, :1], bits[:, 1:]
    grams = [displacement_gram(model[name], [one[name] for one in candidates]) for name in names]
    return Kin(
        gram=torch.stack(grams),
        noise=noise,
        coarser=torch.stack([noise[:, :1] * (own < others), noise[:, 1:] * (others < own)]),
        parameters=torch.tensor([model[name].numel() for name in names], dtype=torch.float64),
        same=torch.zeros(0, len(candidates), dtype=torch.bool),
    )


# --- families at random ---------------------------------------------------------------------------

KINDS = (
    *("chain", "sibling", "hidden", "descendant", "linear merge", "task arithmetic"),
    *("copy", "rounded copy", "unrelated"),
)


@dataclass(frozen=True)
class Case:
    """A model, its candidates, and what each of them is; "" where no role is asked for."""

    kind: str
    dtype: torch.dtype
    model: Weights
    candidates: tuple[Weights, ...]
    roles: tuple[str, ...] = field(default=())


def simulated(seed: int) -> Case:
    """A family at random: its kind, precision, sizes of updates (1 to 10 %), and ranks."""
    draw = random.Random(seed)
    kind, dtype = KINDS[seed % len(KINDS)], draw.choice([torch.float32, torch.bfloat16])
    seeds = iter(range(100 * seed, 100 * seed + 100))

    def child(parent: Weights) -> Weights:
        how = Updates(size=10 ** draw.uniform(-2, -1), rank=draw.choice([None, 8, 2]))
        return tuned(parent, next(seeds), how)

    first = drawn(next(seeds), dtype=dtype)
    second = child(first)
    third, other = child(second), child(second)
    stranger = drawn(next(seeds), dtype=dtype)
    share, more = draw.uniform(0.2, 0.8), draw.uniform(0.3, 1)
    match kind:
        case "chain":
            model, known = child(third), {"PARENT": third, "ANCESTOR": second, "ANCESTOR ": first}
        case "sibling":
            model, known = other, {"PARENT": second, "SIBLING": third, "ANCESTOR": first}
        case "hidden":
            model, known = other, {"SIBLING": third, "PARENT": first}
        case "descendant":
            model, known = third, {"PARENT": second, "DESCENDANT": child(third)}
        case "linear merge":
            model = merged([(share, third), (1 - share, other)], dtype)
            known = {"MERGED": third, "MERGED ": other, "": second}
        case "task arithmetic":
            parts = [(1 - share - more, second), (share, third), (more, other)]
            model = merged(parts, dtype)
            known = {"MERGED": third, "MERGED ": other, "MERGED  ": second}
        case "copy":
            model, known = {**third}, {"COPY": third, "": second}
        case "rounded copy":
            fine = tuned({n: w.float() for n, w in second.items()}, next(seeds))
            model = {name: weight.bfloat16() for name, weight in fine.items()}
            known = {"QUANTISED": fine, "": second}
        case _:
            model, known = child(third), {}
    roles = [*known, "UNRELATED"]
    candidates = [*known.values(), stranger]
    order = draw.sample(range(len(roles)), len(roles))
    return Case(
        *(kind, dtype, model),
        tuple(candidates[i] for i in order),
        tuple(roles[i].strip() for i in order),
    )
