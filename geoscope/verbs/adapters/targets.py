"""Which matrices of a model get an adapter, and under which module paths?

Every linear layer in a numbered block, as `compare` scopes them, without the routers of experts;
`--targets` narrows that to kinds by the last part of their names, `--include` reaches further.
Stacked experts are `target_parameters` of PEFT, with factors for every expert of the stack.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from geoscope.adapters.peft_config import target_modules
from geoscope.adapters.peft_names import (
    dropped_names,
    expert_findings,
    expert_name,
    lora_keys,
    module_paths,
    parameter_keys,
    stack_findings,
)
from geoscope.errors import CheckpointError, OptionError, first_names
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.experts import expert_parts, is_stack
from geoscope.models.scope import MATRIX, Scope
from geoscope.names import in_natural_order
from geoscope.peft.packing import is_packed_straight
from geoscope.records import Skipped, TensorInfo
from geoscope.verbs.adapters.options import InitOptions

__all__ = ["Target", "Targets", "choose_targets"]

_NOT_NAMED = "not among `targets`"
_DROPPED = "of multi-token prediction: the live model has no such block"
_ROUTER = re.compile(r"\.(?:gate|router|shared_expert_gate)\.weight$")


@dataclass(frozen=True)
class Target:
    """A weight that gets an adapter.

    info: its header. path: of the module in the live model, of a stack of experts that of the
    parameter. keys: of A and B. experts: how many matrices it holds, None for one
    that is not a stack.
    is_turned: whether each of them lies (in, out) in the file.
    """

    info: TensorInfo
    path: str
    keys: tuple[str, str]
    experts: int | None = None
    is_turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        first, second = self.info.shape[-2:]
        return (second, first) if self.is_turned else (first, second)

    @property
    def names(self) -> tuple[str, ...]:
        """What its matrices are called in a report."""
        if self.experts is None:
            return (self.info.name,)
        return tuple(expert_name(self.info.name, expert) for expert in range(self.experts))


@dataclass(frozen=True)
class Targets:
    """weights: name on disk → target, in natural order. modules, parameters: what `target_modules`
    and `target_parameters` of the config say. skipped: what was left out, with reasons.
    """

    weights: Mapping[str, Target]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether these are Conv1D layers, which hold (in, out)."""
        return all(weight.info.transposed for weight in self.weights.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name of each matrix in a report → (out, in)."""
        return {name: weight.shape for weight in self.weights.values() for name in weight.names}


def choose_targets(checkpoint: Checkpoint, options: InitOptions) -> Targets:
    """The matrices to adapt, from headers alone. Raises OptionError and CheckpointError."""
    scope = Scope.of(options.selection, checkpoint.tensors.values())
    chosen: dict[str, TensorInfo] = {}
    skipped: list[Skipped] = []
    dropped = set(dropped_names(list(checkpoint.tensors), checkpoint.config))
    for info in checkpoint.tensors.values():
        place = scope.place(info)
        reason = place.reason if isinstance(place, Skipped) else _left_out(info, options)
        if info.name in dropped:
            place, reason = "", _DROPPED
        is_wanted_stack = isinstance(place, Skipped) and place.missing and is_stack(info.name)
        if is_wanted_stack and info.name not in dropped:
            reason = _not_named(info, options)
            _refuse_unknown_stack(info, checkpoint)
        if (place == MATRIX or is_wanted_stack) and reason is None:
            chosen[info.name] = info
        elif len(info.shape) > 1:
            skipped.append(Skipped(info.name, reason or "no matrix"))
            if reason != _NOT_NAMED:
                _refuse_stack(place, info)
    _check_named(chosen, checkpoint, options)
    for info in chosen.values():
        _check_one(checkpoint, info, options)
    every = module_paths(
        [
            name
            for name in checkpoint.tensors
            if (name.endswith(".weight") or is_stack(name)) and name not in dropped
        ],
        checkpoint.config,
    )
    stacks = {name: path for name, path in every.paths.items() if is_stack(name)}
    modules = {name: path for name, path in every.paths.items() if name not in stacks}
    adapted = [path for name, path in modules.items() if name in chosen]
    adapted_stacks = [path for name, path in stacks.items() if name in chosen]
    findings = (
        *expert_findings(adapted, [*modules.values()]),
        *stack_findings(adapted, adapted_stacks),
    )
    if findings:
        raise OptionError(f"{checkpoint.ref.given}: {findings[0]}")
    keys = _keys(adapted, adapted_stacks)
    weights = {
        name: _target(chosen[name], every.paths[name], keys, checkpoint)
        for name in in_natural_order(chosen)
    }
    return Targets(
        weights=weights,
        modules=tuple(target_modules(adapted, [*modules.values()])),
        parameters=tuple(target_modules(adapted_stacks, [*stacks.values()])),
        skipped=tuple(skipped),
        notes=(
            *every.notes,
            *_dropped_notes(dropped, scope, checkpoint),
            *_stack_notes(adapted_stacks),
        ),
    )


def _keys(modules: Collection[str], stacks: Collection[str]) -> dict[str, tuple[str, str]]:
    """Path → keys of A and B. Of a block's two stacks PEFT wraps gate_up_proj innermost."""
    keys = {path: lora_keys(path) for path in modules}
    for container in dict.fromkeys(path.rpartition(".")[0] for path in stacks):
        leaves = [leaf for leaf in ("gate_up_proj", "down_proj") if f"{container}.{leaf}" in stacks]
        of_leaves = parameter_keys(container, leaves)
        keys |= {f"{container}.{leaf}": pair for leaf, pair in of_leaves.items()}
    return keys


def _target(
    info: TensorInfo, path: str, keys: Mapping[str, tuple[str, str]], checkpoint: Checkpoint
) -> Target:
    if not is_stack(info.name):
        return Target(info, path, keys[path])
    is_turned = expert_parts(info, checkpoint.tensors, checkpoint.config)[0].turned
    return Target(info, path, keys[path], experts=info.shape[0], is_turned=is_turned)


def _stack_notes(stacks: Collection[str]) -> tuple[str, ...]:
    if not stacks:
        return ()
    return (
        f"{len(stacks)} stacks of experts are adapted as parameters (target_parameters): they need "
        "PEFT 0.19 or later, and an inference engine that serves such adapters",
    )


def _refuse_unknown_stack(info: TensorInfo, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a stack of which nothing tells how PEFT packs its factors."""
    parts = expert_parts(info, checkpoint.tensors, checkpoint.config)
    if not parts:
        return
    if not is_packed_straight(checkpoint.config, is_turned=parts[0].turned):
        raise CheckpointError(
            f"{info.name}: its experts are stored as (in, out), but PEFT reads them as (out, in) "
            "in this family, so A and B would be swapped; leave it out with `exclude`"
        )


def _dropped_notes(
    dropped: Collection[str], scope: Scope, checkpoint: Checkpoint
) -> tuple[str, ...]:
    matrices = [name for name in dropped if scope.place(checkpoint.tensors[name]) == MATRIX]
    if not matrices:
        return ()
    names = first_names(in_natural_order(matrices), 1)
    return (
        f"{len(matrices)} matrices are left out, first {names}: blocks of multi-token prediction, "
        "which the live model does not have; they stay as they are",
    )


def _left_out(info: TensorInfo, options: InitOptions) -> str | None:
    """Why a matrix in scope is not adapted, or None."""
    if options.targets:
        return _not_named(info, options)
    if _ROUTER.search(info.name) and not options.include:
        return "router: `targets` reaches it"
    if not info.name.endswith(".weight"):
        return "not the weight of a module"
    return None


def _not_named(info: TensorInfo, options: InitOptions) -> str | None:
    is_named = not options.targets or _kind(info.name) in options.targets
    return None if is_named else _NOT_NAMED


def _kind(name: str) -> str:
    """The last part of a module's name: q_proj."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _refuse_stack(place: str | Skipped, info: TensorInfo) -> None:
    if isinstance(place, Skipped) and place.missing:
        raise CheckpointError(
            f"{info.name}: {place.reason}; leave it out with `exclude`, or give a checkpoint that "
            "stores each expert by itself"
        )


def _check_named(
    chosen: Mapping[str, TensorInfo], checkpoint: Checkpoint, options: InitOptions
) -> None:
    if unknown := sorted(set(options.targets) - {_kind(name) for name in chosen}):
        present = sorted({_kind(info.name) for info in checkpoint.tensors.values() if _two(info)})
        raise OptionError(
            f"`targets` {','.join(unknown)}: no matrix in scope has that name; "
            f"there are {first_names(present, 12)}"
        )
    if chosen:
        return
    for name, kept in checkpoint.tied_to.items():
        reason = options.selection.reason_against(name, in_default_scope=False, scope_reason="-")
        if name not in checkpoint.tensors and reason is None:
            raise CheckpointError(
                f"{checkpoint.ref.given}: {name} is tied to {kept} and has no matrix of its own; "
                "leave it out of `include`"
            )
    raise CheckpointError(
        f"{checkpoint.ref.given}: holds no matrix to adapt under these options; "
        "see `geoscope inspect`, and `include`"
    )


def _two(info: TensorInfo) -> bool:
    return len(info.shape) == 2 or is_stack(info.name)


def _check_one(checkpoint: Checkpoint, info: TensorInfo, options: InitOptions) -> None:
    m, n = info.shape[-2:]
    for option, rank in (("rank", options.rank), ("spec_rank", options.spec_rank or 1)):
        if rank > min(m, n):
            raise OptionError(
                f"{info.name}: `{option}` {rank} is above the {min(m, n)} that a {m}×{n} matrix "
                "has; use a smaller rank, or `exclude` it"
            )
    partner = next(
        (a if b == info.name else b for a, b in checkpoint.tied_to.items() if info.name in (a, b)),
        None,
    )
    if partner is not None and options.chosen_layout == "residual":
        raise CheckpointError(
            f"{info.name}: is tied to {partner}, so a residual would change both; "
            "use `layout` mirror, or `exclude` it"
        )
