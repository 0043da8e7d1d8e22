"""Are the factors of stacked experts those of the update, or those of its transpose?

PEFT packs a parameter (E, d1, d2) by the order of its sides, not by their meaning:

    up to 0.18    A (E·r, d1), B (d2, r·E)
    from 0.19     A (E·r, d2), B (d1, r·E), but as above for classes that say they are transposed

Most models hold (E, out, in), so the old way stores factors of ΔWᵀ. One file is packed in one way.
The shapes of a block's two stacks tell it, or those of the base; where every stack is square, the
`peft_version` of adapter_config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from geoscope.errors import CheckpointError
from geoscope.models.experts import expert_parts as parts_of_stack
from geoscope.models.fused import text_config
from geoscope.peft.module import AdapterModule
from geoscope.records import TensorInfo

__all__ = [
    "Sides",
    "base_sides",
    "is_old",
    "is_packed_straight",
    "packed_by_base",
    "packed_by_shapes",
]

_Module = TypeVar("_Module", bound=AdapterModule)

_LAST_OLD = (0, 18)
# Families whose classes call themselves transposed, so that every version packs them alike.
_TRANSPOSED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")


@dataclass(frozen=True)
class Sides:
    """(out, in) of the experts of a stack in the base. is_turned: whether the live model holds
    them (E, in, out)."""

    out: int
    inner: int
    is_turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.inner


def packed_by_shapes(modules: Mapping[str, _Module]) -> dict[str, _Module]:
    """The modules, with stacks turned where their own shapes tell how the file is packed.

    gate_up (2I, H) and down (H, I) of one block never fit both ways.
    """
    votes = {one for pair in _blocks(modules) if (one := _own_vote(*pair)) is not None}
    return _packed(modules, votes.pop()) if len(votes) == 1 else dict(modules)


def packed_by_base(
    modules: Mapping[str, _Module],
    sides: Mapping[str, Sides],
    config: Mapping[str, Any],
    base_config: Mapping[str, Any],
    label: str,
) -> dict[str, _Module]:
    """The modules, with stacks turned as the base tells; where it has square ones alone, as
    `peft_version` tells.

    sides: name of a stack → its sides in the base. Raises CheckpointError where nothing tells.
    """
    open_ones = {n: one for n, one in sides.items() if modules[n].is_turned is None}
    if not open_ones:
        return dict(modules)
    votes = {_base_vote(modules[name].shape, one.shape) for name, one in open_ones.items()}
    if votes == {None}:
        first = next(iter(open_ones))
        votes = {_by_version(config, base_config, open_ones[first].is_turned)}
        if votes == {None}:
            raise _undecided(first, modules[first], config, label)
    votes.discard(None)
    return _packed(modules, votes == {True})


def base_sides(
    module: AdapterModule,
    infos: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    parts: tuple[tuple[str, ...], ...],
) -> Sides | None:
    """The sides of a stack in the base; None where the base has no such stack, or does not tell.

    infos: live path → base tensor. parts: paths of the experts' own modules, where files keep them
    apart.
    """
    info = infos.get(module.name)
    if info is None:
        rows = [infos[path].shape for path in parts[0]] if parts else []
        return Sides(sum(row[0] for row in rows), rows[0][1], is_turned=False) if rows else None
    found = parts_of_stack(info, {one.name: one for one in infos.values()}, config)
    if not found:
        return None
    _, a, b = info.shape
    return Sides(b, a, is_turned=True) if found[0].turned else Sides(a, b, is_turned=False)


def _blocks(modules: Mapping[str, AdapterModule]) -> Iterator[tuple[AdapterModule, AdapterModule]]:
    for name, one in modules.items():
        holder, _, leaf = name.rpartition(".")
        other = modules.get(f"{holder}.down_proj")
        if leaf == "gate_up_proj" and other is not None and _is_open(one) and _is_open(other):
            yield one, other


def _is_open(module: AdapterModule) -> bool:
    return module.is_stack and module.is_turned is None


def _own_vote(wide: AdapterModule, down: AdapterModule) -> bool | None:
    (a, b), (c, d) = wide.shape, down.shape
    if (a, b) == (2 * d, c):
        return False
    return True if (b, a) == (2 * c, d) else None


def _base_vote(stored: tuple[int, int], sides: tuple[int, int]) -> bool | None:
    """None for a square, and for what fits in neither way."""
    if stored[0] == stored[1]:
        return None
    return {sides: False, sides[::-1]: True}.get(stored)


def _packed(modules: Mapping[str, _Module], is_turned: bool) -> dict[str, _Module]:
    return {name: _as(one, is_turned) if _is_open(one) else one for name, one in modules.items()}


def _as(module: _Module, is_turned: bool) -> _Module:
    m, n = module.shape
    return replace(module, is_turned=is_turned, shape=(n, m) if is_turned else (m, n))


def is_old(version: Any) -> bool:
    """Whether a `peft_version` is one that packs by the order of the sides alone."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) <= _LAST_OLD


def is_packed_straight(base_config: Mapping[str, Any], *, is_turned: bool) -> bool:
    """Whether PEFT from 0.19 on packs factors of the update, and not of its transpose.

    base_config: config.json of the base. is_turned: whether its experts lie (in, out).
    """
    return (text_config(base_config).get("model_type") in _TRANSPOSED) is is_turned


def _by_version(
    config: Mapping[str, Any], base_config: Mapping[str, Any], live_is_turned: bool
) -> bool | None:
    """Whether factors are of ΔWᵀ; None for a version that is not told, or between both ways."""
    version = config.get("peft_version")
    if not isinstance(version, str) or re.fullmatch(r"\d+\.\d+(\.\d+)?", version) is None:
        return None
    takes_first = is_old(version) or text_config(base_config).get("model_type") in _TRANSPOSED
    return takes_first is not live_is_turned


def _undecided(
    name: str, module: AdapterModule, config: Mapping[str, Any], label: str
) -> CheckpointError:
    m, n = module.shape
    version = config.get("peft_version")
    says = "no peft_version" if version is None else f"peft_version {version!r}"
    return CheckpointError(
        f"{label}: {name} is adapted as {m} × {n}, with {says} in adapter_config.json. PEFT up to "
        "0.18 stored factors of the transposed update for experts, so the orientation is unknown. "
        'Set peft_version there to the version used in training, such as "0.18.1"'
    )
