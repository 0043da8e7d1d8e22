"""Held-out errors of every extrapolator, from the increment Grams alone.

See docs/methods.md#held-out-skill. A method at origin o predicts ΔŴ for checkpoint τ > o and
thereby moves away from the last checkpoint it saw by D = ΔŴ − Δ_o. Three inner products say all
there is to know:

    held   = ‖Δ_τ − Δ_o‖²                      error of hold
    ahead  = ⟨D, Δ_τ − Δ_o⟩,  energy = ‖D‖²    error of damped(λ): held − 2λ·ahead + λ²·energy

λ = 1 is the method itself, and for a linear one this is G_ττ − 2wᵀg_τ + wᵀGw. They are taken from
H, where nothing cancels. Methods that are not linear in Δ join with their own `PredictionProducts`.

Everything that is learned (λ, the choice of `auto`) is learned at origin o from targets
τ ≤ o only, so that the errors are held out for it too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from geoscope.errors import OptionError
from geoscope.trajectory.extrapolators import EXTRAPOLATORS, Weighted
from geoscope.trajectory.increments import Increments

__all__ = ["Backtest", "PredictionProducts", "backtest", "pairs_of", "skill_of"]

# The first origin of the report, and the first that damping and choices may learn from.
_LEAST_ORIGIN, _LEAST_PAST = 3, 2


@dataclass(frozen=True)
class PredictionProducts:
    """How one method moves, (M, P) fp64 for M tensors and the P pairs of `pairs_of`.

    ahead: ⟨ΔŴ − Δ_o, Δ_τ − Δ_o⟩. energy: ‖ΔŴ − Δ_o‖². Zeros where a method has nothing to say: it
    holds there.
    """

    ahead: Tensor
    energy: Tensor

    def error(self, held: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        """‖ΔŴ − Δ_τ‖² of the method damped by λ."""
        error = held - 2 * factor * self.ahead + factor * factor * self.energy
        return error.clamp_min(0)


def pairs_of(count: int) -> tuple[tuple[int, int], ...]:
    """(o, τ) with 2 ≤ o < τ ≤ T, by origin; numbers of checkpoints, 1 the first after the base."""
    return tuple((o, tau) for o in range(_LEAST_PAST, count) for tau in range(o + 1, count + 1))


def _first_origin(count: int, least: int) -> int:
    return max(least, math.ceil(count / 3))


def skill_of(error: Tensor, held: Tensor) -> float | None:
    """1 − Σerr/Σerr_hold; None where hold has no error (or there is nothing to predict)."""
    total = float(held.sum())
    return 1 - float(error.sum()) / total if total > 0 else None


@dataclass(frozen=True)
class Backtest:
    """Held-out errors of the methods on M tensors. Made by `backtest`.

    steps: base first. names: the tensors. pairs: (o, τ), P of them, those that only λ and choices
    learn from too; `rolling` marks the ones that are reported, o = max(3, ⌈T/3⌉) … T−1. held:
    ‖Δ_τ − Δ_o‖², size: ‖Δ_τ‖², rounding: N_o of checkpoint o as stored, all (M, P). moves: method →
    its moves.

    Methods are named as in `moves`; beside them stand `hold`, `damped(x)` of each with the pooled
    λ*, and `auto` (per tensor the best of all, or hold).
    """

    steps: tuple[float, ...]
    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    held: Tensor
    size: Tensor
    rounding: Tensor
    moves: Mapping[str, PredictionProducts]

    @property
    def count(self) -> int:
        """T, the number of checkpoints after the base."""
        return len(self.steps) - 1

    @property
    def methods(self) -> tuple[str, ...]:
        """All that can be asked for: hold, each method, each damped, auto."""
        return ("hold", *self.moves, *self._damped, "auto")

    @cached_property
    def origins(self) -> Tensor:
        """o of each pair, (P,)."""
        return torch.tensor([o for o, _ in self.pairs], dtype=torch.long)

    @cached_property
    def targets(self) -> Tensor:
        """τ of each pair, (P,)."""
        return torch.tensor([tau for _, tau in self.pairs], dtype=torch.long)

    @cached_property
    def rolling(self) -> Tensor:
        """The pairs that are reported, (P,) bool."""
        return self.origins >= _first_origin(self.count, _LEAST_ORIGIN)

    @cached_property
    def distance(self) -> Tensor:
        """t_τ − t_o of each pair, (P,)."""
        steps = torch.tensor(self.steps, dtype=torch.float64)
        return steps[self.targets] - steps[self.origins]

    def at(self, origins: Collection[int]) -> Backtest:
        """The same from these origins alone, for a method that was not tried at every one."""
        kept = torch.tensor([o in origins for o, _ in self.pairs])
        return replace(
            self,
            pairs=tuple(pair for pair in self.pairs if pair[0] in origins),
            held=self.held[:, kept],
            size=self.size[:, kept],
            rounding=self.rounding[:, kept],
            moves={
                name: PredictionProducts(one.ahead[:, kept], one.energy[:, kept])
                for name, one in self.moves.items()
            },
        )

    def past(self, origin: int) -> Tensor:
        """The pairs that may be learned from at an origin, (P,) bool: τ ≤ o.

        The same rule as that of the rolling origins, on what was seen then: their origins start at
        max(2, ⌈o/3⌉), two checkpoints being the fewest that make a line.
        """
        return (self.targets <= origin) & (self.origins >= _first_origin(origin, _LEAST_PAST))

    def factor(self, method: str, origin: int | None = None) -> float:
        """λ* = Σ⟨D, Δ_τ − Δ_o⟩/Σ‖D‖² over tensors and past pairs, clipped to [0, 1].

        origin: default T, for predictions beyond the series. 0, which is hold, where there is
        nothing to learn from.
        """
        moves = self._moves(method)
        past = self.past(self.count if origin is None else origin)
        ahead, energy = float(moves.ahead[:, past].sum()), float(moves.energy[:, past].sum())
        return min(1.0, max(0.0, ahead / energy)) if energy > 0 else 0.0

    @cached_property
    def factors(self) -> dict[str, float]:
        """λ* of every method for predictions beyond the series."""
        return {name: self.factor(name) for name in self.moves}

    def error(self, method: str) -> Tensor:
        """‖ΔŴ − Δ_τ‖², (M, P), of any method by name."""
        if method == "hold":
            return self.held
        if method == "auto":
            return self._auto
        if method not in self._damped:
            return self._moves(method).error(self.held)
        inner = self._damped[method]
        by_origin = {o: self.factor(inner, o) for o in set(self.origins.tolist())}
        factor = torch.tensor([by_origin[o] for o, _ in self.pairs], dtype=torch.float64)
        return self._moves(inner).error(self.held, factor)

    def skill(self, method: str) -> float | None:
        """1 − Σerr/Σerr_hold over tensors and reported pairs."""
        return skill_of(self.error(method)[:, self.rolling], self.held[:, self.rolling])

    def tensor_skill(self, method: str) -> dict[str, float | None]:
        """1 − Σerr/Σerr_hold of each tensor over the reported pairs."""
        errors, held = self.error(method)[:, self.rolling], self.held[:, self.rolling]
        return {
            name: skill_of(error, one)
            for name, error, one in zip(self.names, errors, held, strict=True)
        }

    def choice(self) -> dict[str, str]:
        """What `auto` takes beyond the series: per tensor the method with the least error on the
        past pairs, hold where none is better than that or no pair is reported.

        A damped method is judged with the λ* that it will be used with, as at every origin of the
        backtest, so that the skill of `auto` is that of this very choice.
        """
        candidates = self._candidates
        if not candidates or not bool(self.rolling.any()):
            return dict.fromkeys(self.names, "hold")
        errors = torch.stack([self._at(candidate, self.count) for candidate in candidates])
        names = [*candidates, "hold"]
        picked = self._pick(errors, self.count).tolist()
        return {name: names[which] for name, which in zip(self.names, picked, strict=True)}

    def best(self) -> str:
        """The one method of the best pooled skill, hold where none has any."""
        skills = {method: self.skill(method) for method in self._candidates}
        known = {method: skill for method, skill in skills.items() if skill is not None}
        if not known or max(known.values()) <= 0:
            return "hold"
        return max(known, key=known.__getitem__)

    @cached_property
    def _auto(self) -> Tensor:
        """Errors when the choice at each origin is made from its past. (M, P)"""
        chosen = self.held.clone()
        for origin in sorted(set(self.origins.tolist())):
            errors = [self._at(method, origin) for method in self._candidates]
            stack = torch.stack([*errors, self.held])
            which = self._pick(stack[:-1], origin)
            here = self.origins == origin
            index = which[None, :, None].expand(1, -1, int(here.sum()))
            chosen[:, here] = stack[:, :, here].gather(0, index)[0]
        return chosen

    @cached_property
    def _damped(self) -> dict[str, str]:
        """`damped(x)` → x."""
        return {f"damped({name})": name for name in self.moves}

    @property
    def _candidates(self) -> list[str]:
        """What `auto` chooses from: each method, plain and damped."""
        return [name for damped, plain in self._damped.items() for name in (plain, damped)]

    def _moves(self, method: str) -> PredictionProducts:
        if method not in self.moves:
            raise OptionError(
                f"{method!r} was not backtested; there are {', '.join(('hold', *self.moves))}"
            )
        return self.moves[method]

    def _at(self, method: str, origin: int) -> Tensor:
        """Errors of a method with what it has learned at one origin, for all pairs. (M, P)"""
        inner = self._damped.get(method)
        if inner is None:
            return self._moves(method).error(self.held)
        return self._moves(inner).error(self.held, self.factor(inner, origin))

    def _pick(self, errors: Tensor, origin: int) -> Tensor:
        """Per tensor the place of the method with the least error on the past pairs of an origin,
        or C for hold. errors: (C, M, P) → (M,).
        """
        past = self.past(origin)
        sums = errors[:, :, past].sum(2)
        held = self.held[:, past].sum(1)
        if not len(sums):
            return torch.zeros(len(held), dtype=torch.long)
        least, which = sums.min(0)
        return torch.where(least < held, which, len(sums))


def backtest(
    increments: Mapping[str, Increments],
    methods: Sequence[str] = tuple(EXTRAPOLATORS),
    *,
    others: Mapping[str, PredictionProducts] | None = None,
) -> Backtest:
    """Backtest extrapolators on tensors of one series.

    increments: name → Increments, all of the same steps. methods: names in EXTRAPOLATORS. others:
    method → its moves, in the order of `increments`. With fewer than 4 checkpoints after the base
    no pair is reported. Raises OptionError.
    """
    series = list(increments.values())
    if not series:
        raise OptionError("nothing to backtest: no tensor was given")
    steps = series[0].steps
    for name, one in increments.items():
        if one.steps != steps:
            raise OptionError(f"{name} has other steps than the first tensor; all must agree")
    H = torch.stack([item.H.to(torch.float64) for item in series])
    pairs = pairs_of(len(steps) - 1)
    rules = {name: EXTRAPOLATORS[name] for name in methods if name != "hold"}
    moves = {name: _linear_moves(H, series[0].elapsed, one) for name, one in rules.items()}
    for name, one in (others or {}).items():
        if one.ahead.shape != (len(H), len(pairs)) or one.energy.shape != one.ahead.shape:
            raise OptionError(
                f"the moves of {name} are {tuple(one.ahead.shape)}; "
                f"{(len(H), len(pairs))} are needed, one row per tensor, one column per pair"
            )
        moves[name] = one
    size = H.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
    targets = torch.tensor([tau for _, tau in pairs], dtype=torch.long)
    origins = torch.tensor([o for o, _ in pairs], dtype=torch.long)
    rounding = torch.tensor([item.rounding for item in series], dtype=torch.float64)
    return Backtest(
        steps,
        tuple(increments),
        pairs,
        _held(H),
        size[:, targets - 1],
        rounding[:, origins],
        moves,
    )


def _origins(T: int) -> range:
    return range(_LEAST_PAST, T)


def _held(H: Tensor) -> Tensor:
    """‖Δ_τ − Δ_o‖² = Σ_{o<i,j≤τ} H_ij, (M, P)."""
    T = H.shape[-1]
    parts = [
        H[:, o:, o:].cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).clamp_min(0) for o in _origins(T)
    ]
    return torch.cat(parts, 1) if parts else H.new_zeros(len(H), 0)


def _linear_moves(H: Tensor, elapsed: Tensor, method: Weighted) -> PredictionProducts:
    """Of ΔŴ = Σw_iΔ_i: D = Σ_i d_iδ_i with d_i = Σ_{j≥i}(w − e_o)_j over the observed."""
    T = H.shape[-1]
    ahead, energy = [], []
    for o in _origins(T):
        if o < method.least:
            ahead.append(H.new_zeros(len(H), T - o))
            energy.append(H.new_zeros(len(H), T - o))
            continue
        seen = H[:, :o, :o]
        weights = method.rule(seen.cumsum(1).cumsum(2), elapsed[:o], elapsed[o:]).clone()
        weights[..., -1] -= 1
        d = weights.flip(-1).cumsum(-1).flip(-1)
        to_targets = H[:, :o, o:].cumsum(2)  # ⟨δ_i, Δ_τ − Δ_o⟩, (M, o, T − o)
        ahead.append((d * to_targets.mT).sum(-1))
        energy.append(((d @ seen) * d).sum(-1).clamp_min(0))
    if not ahead:
        empty = H.new_zeros(len(H), 0)
        return PredictionProducts(empty, empty)
    return PredictionProducts(torch.cat(ahead, 1), torch.cat(energy, 1))
