"""Which matrices of a model get an adapter, and under which module paths?

Every linear layer in a numbered block, as `compare` scopes them, without the routers of experts;
`--targets` narrows that to kinds by the last part of their names, `--include` reaches further.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from geoscope.adapters.peft_config import target_modules
from geoscope.adapters.peft_names import dropped_names, expert_findings, module_paths
from geoscope.errors import CheckpointError, OptionError, first_names
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.scope import MATRIX, Scope
from geoscope.names import in_natural_order
from geoscope.records import Skipped, TensorInfo
from geoscope.verbs.adapters.options import InitOptions

__all__ = ["Targets", "choose_targets"]

_DROPPED = "of multi-token prediction: the live model has no such block"
_ROUTER = re.compile(r"\.(?:gate|router|shared_expert_gate)\.weight$")


@dataclass(frozen=True)
class Targets:
    """matrices: name on disk → header, in natural order. paths: the same → module path. modules:
    what `target_modules` of the config says. skipped: what was left out, with reasons.
    """

    matrices: Mapping[str, TensorInfo]
    paths: Mapping[str, str]
    modules: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether these are Conv1D layers, which hold (in, out)."""
        return all(info.transposed for info in self.matrices.values())


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
        if place == MATRIX and reason is None:
            chosen[info.name] = info
        elif len(info.shape) > 1:
            skipped.append(Skipped(info.name, reason or "no matrix"))
            _refuse_stack(place, info)
    _check_named(chosen, checkpoint, options)
    for info in chosen.values():
        _check_one(checkpoint, info, options)
    matrices = {name: chosen[name] for name in in_natural_order(chosen)}
    every = module_paths(
        [name for name in checkpoint.tensors if name.endswith(".weight") and name not in dropped],
        checkpoint.config,
    )
    paths = {name: every.paths[name] for name in matrices}
    if found := expert_findings([*paths.values()], [*every.paths.values()]):
        raise OptionError(f"{checkpoint.ref.given}: {found[0]}")
    return Targets(
        matrices=matrices,
        paths=paths,
        modules=tuple(target_modules([*paths.values()], [*every.paths.values()])),
        skipped=tuple(skipped),
        notes=(*every.notes, *_dropped_notes(dropped, scope, checkpoint)),
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
        return None if _kind(info.name) in options.targets else "not among `targets`"
    if _ROUTER.search(info.name) and not options.include:
        return "router: `targets` reaches it"
    if not info.name.endswith(".weight"):
        return "not the weight of a module"
    return None


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
    return len(info.shape) == 2


def _check_one(checkpoint: Checkpoint, info: TensorInfo, options: InitOptions) -> None:
    m, n = info.shape[0], info.shape[1]
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
