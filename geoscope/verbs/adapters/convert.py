"""What training made of an initialised adapter, as a plain LoRA on the original.

The initial and the trained adapter are read, checked to belong together, and combined module by
module (`geoscope.adapters.conversion`). No model is opened; nothing is written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope.adapters.conversion import compressed, concatenated, fused_experts
from geoscope.adapters.peft_names import lora_keys
from geoscope.adapters.table import starts_on_base
from geoscope.arguments import scalar
from geoscope.engine import matrix_boundary
from geoscope.errors import OptionError, PairingError, first_names
from geoscope.foreign import exists, is_folder, local_path
from geoscope.formats.safetensors_writer import FilePlan
from geoscope.linalg import Product
from geoscope.peft.adapter import Adapter
from geoscope.peft.folder import CONVERTED, record_beside
from geoscope.peft.lora import expert_parts, unstacked
from geoscope.peft.module import AdapterModule
from geoscope.sources.memory import Model, Opened, as_model_or_reference
from geoscope.sources.reference import HubReference, parse_reference
from geoscope.verbs.adapters.initialised import Initialised
from geoscope.verbs.adapters.origin import AdapterOrigin, as_adapter, origin_of
from geoscope.verbs.adapters.plain_lora import carried, plain_config, plain_plan, scaling_of_all
from geoscope.verbs.models import open_model

__all__ = ["Conversion", "ModuleEnergy", "conversion_of", "discarded_share"]

# What a trained adapter has of a start that is not its own: nothing, and what chance gives.
_NOTHING, _DEVIATIONS, _TELLING = 0.05, 3.0, 0.5


@dataclass(frozen=True)
class ModuleEnergy:
    """What the rank leaves out of one module, its experts taken together.

    energy: ‖ΔW‖_F². discarded: the part of it beyond the rank, Σ σ_i².
    """

    name: str
    energy: float
    discarded: float

    @property
    def share(self) -> float:
        """discarded / energy, 0 for an update of zero."""
        return discarded_share([self])


def discarded_share(modules: Sequence[ModuleEnergy]) -> float:
    """Σ discarded / Σ energy, 0 where all updates are zero."""
    energy = sum(module.energy for module in modules)
    return sum(module.discarded for module in modules) / energy if energy > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Conversion:
    """A plain LoRA on the original base, to be written. Made by `conversion_of`.

    config: adapter_config.json. plan: of adapter_model.safetensors; factors are fp32, tensors of
    `modules_to_save` as the trained adapter holds them. notes: one-line remarks for the user.
    origin: what geoscope.json says of where it comes from. inputs: folders that are read.
    """

    config: Mapping[str, Any]
    plan: FilePlan
    notes: tuple[str, ...]
    origin: Mapping[str, Any]
    trained: Adapter
    initial: Adapter | None
    parts: Mapping[str, tuple[str, ...]]
    compress_to: int | None
    inputs: tuple[Path, ...] = ()

    def write(self, put: Callable[[str, Tensor], None]) -> tuple[ModuleEnergy, ...]:
        """Hands every tensor to `put(name, tensor)` in the order of the plan, module by module.

        Returns what the compression leaves out of each; empty for the exact form.
        Raises NumericsError for factors that are not finite.
        """
        module_of = {lora_keys(one.path)[0]: one for one in self.trained.modules.values()}
        waiting: dict[str, Tensor] = {}
        found: list[ModuleEnergy] = []
        for name in self.plan.order:
            if name in module_of:
                module = module_of[name]
                B, A, energy = self._convert(module)
                found += energy
                waiting[lora_keys(module.path)[1]] = B
                put(name, A)
            elif name in waiting:
                put(name, waiting.pop(name))
            else:
                put(name, self.trained.read(name))
        return tuple(found)

    def refuse_unrelated(self) -> None:
        """Raises PairingError where training cannot have begun at the initial adapter.

        ΔW = P − P_0 with P_0 the initial product: trained from it, P holds b = ⟨P, P_0⟩/‖P_0‖² ≈ 1
        of it, and from another start 0 ± ‖P‖/(‖P_0‖√N) (ours). Nothing is said where that
        deviation is too large to tell.
        """
        inner = start = variance = 0.0
        for module in self.trained.modules.values():
            initial = self._initial_factors(module)
            if initial is None:
                return
            own, trained = _energy(*initial, *initial), self.trained.factors(module.name)
            start += own
            inner += _energy(*trained, *initial)
            variance += own * _energy(*trained, *trained) / math.prod(module.shape)
        if not start:
            return
        kept, chance = inner / start, _DEVIATIONS * math.sqrt(variance) / start
        if chance < _TELLING and abs(kept) <= max(_NOTHING, chance):
            assert self.initial is not None
            raise PairingError(
                f"{self.initial.given} does not seem to be the start of {self.trained.given}: "
                f"{self.trained.given} contains {kept:.2g} of it, and an adapter trained from it "
                "contains about 1. Subtracting it would change the model. Give the initial adapter "
                "of this run, or use `force`"
            )

    def _convert(self, module: AdapterModule) -> tuple[Tensor, Tensor, list[ModuleEnergy]]:
        """B and A of one module as they are stored."""
        B, A = self.trained.factors(module.name)
        start = self._initial_factors(module)
        with matrix_boundary(module.name):
            if self.compress_to is None:
                assert start is not None
                return *unstacked(*concatenated(B, A, *start), is_turned=module.is_turned), []
            update = Product.of(B, A, module.scaling)
            if start is not None:
                update = update - Product.of(*start, module.scaling)
            made = compressed(update, self.compress_to, scaling_of_all(self.trained))
        energy = ModuleEnergy(module.name, made.energy, made.discarded)
        return *unstacked(made.B, made.A, is_turned=module.is_turned), [energy]

    def _initial_factors(self, module: AdapterModule) -> tuple[Tensor, Tensor] | None:
        if self.initial is None:
            return None
        parts = self.parts[module.name]
        if parts == (module.name,):
            return self.initial.factors(module.name)
        return _fused(self.initial, parts, module.experts)


def _energy(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor) -> float:
    """⟨B·A, B_0·A_0⟩ of all experts."""
    return float(((B0.mT.double() @ B.double()) * (A0.double() @ A.mT.double())).sum())


def _fused(initial: Adapter, parts: tuple[str, ...], experts: int) -> tuple[Tensor, Tensor]:
    """The stack that PEFT makes of per-expert factors; parts expert by expert."""
    each = len(parts) // experts
    stacks = [
        fused_experts([initial.factors(name) for name in parts[e * each : (e + 1) * each]])
        for e in range(experts)
    ]
    return torch.cat([B for B, _ in stacks]), torch.cat([A for _, A in stacks])


def conversion_of(
    initial: Model | Initialised,
    trained: Model,
    *,
    rank: int | None = None,
    base: Model | None = None,
    force: bool = False,
) -> Conversion:
    """The plan of a conversion, see `convert_adapter`."""
    rank = None if rank is None else scalar(rank, "rank", "int")
    both = as_adapter(initial, "initial"), as_adapter(trained, "trained")
    origin, last = origin_of(both[0], "initial"), origin_of(both[1], "trained")
    named = None if base is None else as_model_or_reference(base, "base")
    start, end = origin.adapter, last.adapter
    for one in (start, end):
        one.refuse_more_than_plain("convert-adapter")
    parts = _matched(start, end)
    starts_at_zero = origin.layout == "mirror" or _plain_start(origin) is not None
    _refuse_rank(rank, end, starts_at_zero, origin)
    _refuse_original_as_base(origin, end)
    reference, revision = _original(origin, start, end, starts_at_zero, named)
    config = plain_config(end, rank, reference, revision)
    others = carried(end)
    made = Conversion(
        config=config,
        plan=plain_plan(end, rank, others),
        notes=_notes(start, end, others, parts),
        origin=_told(origin, last, reference, revision),
        trained=end,
        initial=None if starts_at_zero else start,
        parts=parts,
        compress_to=rank,
        inputs=tuple(one.folder.adapter for one in (origin, last) if one.folder is not None),
    )
    if not force:
        made.refuse_unrelated()
    return made


# --- do the two belong together? ----------------------------------------------------------------


def _matched(start: Adapter, end: Adapter) -> dict[str, tuple[str, ...]]:
    """Module of the trained adapter → its modules in the initial one. Raises PairingError."""
    parts = {name: _parts(start, one) for name, one in end.modules.items()}
    lacking = [name for name, found in parts.items() if not found]
    used = {name for found in parts.values() for name in found}
    left = [name for name in start.modules if name not in used]
    for names, here, there in ((lacking, end, start), (left, start, end)):
        if names:
            raise PairingError(
                f"{len(names)} modules of {here.given} are not in {there.given}: "
                f"{first_names(names)}; give the initial adapter of this very run"
            )
    for name, found in parts.items():
        _refuse_difference(start, end, end.modules[name], [start.modules[one] for one in found])
    return parts


def _parts(start: Adapter, module: AdapterModule) -> tuple[str, ...]:
    """The same module, or the experts' own matrices that PEFT has joined; () for none."""
    if module.name in start.modules:
        return (module.name,)
    return tuple(name for row in expert_parts(module, start.modules) for name in row)


def _refuse_difference(
    start: Adapter, end: Adapter, module: AdapterModule, found: list[AdapterModule]
) -> None:
    each = max(1, len(found) // module.experts)
    m = sum(one.shape[0] for one in found[:each])
    rank = sum(one.rank for one in found[:each])
    sides = {
        "shape": (module.shape, (m, found[0].shape[1])),
        "experts": (module.experts, found[0].experts if found[0].is_stack else len(found) // each),
        "rank": (module.rank, rank),
        "scaling": (module.scaling, found[0].scaling),
    }
    for what, (trained, initial) in sides.items():
        if trained != initial:
            raise PairingError(
                f"{module.name}: {what} {trained} in {end.given}, {initial} in {start.given}; "
                "give the initial adapter of this very run"
            )


def _plain_start(origin: AdapterOrigin) -> str | None:
    """What an adapter began as that stands on the original base as it is; None for the others."""
    method = origin.record.get("method")
    if method == CONVERTED:
        return "converted adapter"
    return f"method {method}" if starts_on_base(method) else None


def _refuse_rank(
    rank: int | None, end: Adapter, starts_at_zero: bool, origin: AdapterOrigin
) -> None:
    largest = max(module.rank for module in end.modules.values()) * (1 if starts_at_zero else 2)
    if rank is None and starts_at_zero:
        what = "mirror layout" if origin.layout == "mirror" else _plain_start(origin)
        raise OptionError(
            f"{end.given}: trained from the {what}, it is a plain LoRA on the original base "
            "already; use it as it is, or compress it with `rank`"
        )
    # At the largest rank nothing is left out; it is of use where it makes different ranks one.
    limit = largest - (len({module.rank for module in end.modules.values()}) == 1)
    if rank is not None and not 1 <= rank <= limit:
        raise OptionError(
            f"`rank` {rank}: takes 1 … {limit}; rank {largest} is exact: "
            + ("use the adapter as it is" if starts_at_zero else "leave `rank` out")
        )


def _refuse_original_as_base(origin: AdapterOrigin, end: Adapter) -> None:
    """A residual's adapter counts on the rewritten base; on the original W it was another model."""
    known = (origin.record.get("base") or {}).get("reference")
    if origin.layout == "residual" and known and end.base and _same_model(end.base, known):
        raise PairingError(
            f"{end.given}: its base is the original model {known}, but an adapter of "
            f"{origin.given} needs the rewritten base. Give the adapter that was trained on the "
            "rewritten base. If only the name is wrong, correct base_model_name_or_path"
        )


def _same_model(one: str, two: str) -> bool:
    paths = [local_path(name) for name in (one, two)]
    return one == two or (all(map(is_folder, paths)) and paths[0].samefile(paths[1]))


def _notes(
    start: Adapter, end: Adapter, others: tuple[str, ...], parts: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    notes: list[str] = []
    if all(_is_unchanged(start, end, name, found) for name, found in parts.items()):
        notes.append(
            f"{end.given} has the very factors of {start.given}: nothing was trained, and the "
            "update is zero"
        )
    if start.base != end.base:
        notes.append(
            f"base_model_name_or_path is {end.base} in {end.given} and {start.base} in "
            f"{start.given}; taken as one model under two names"
        )
    if others:
        notes.append(
            f"{len(others)} tensors of modules_to_save are copied as stored: {first_names(others)}"
        )
    return tuple(notes)


def _is_unchanged(start: Adapter, end: Adapter, name: str, found: tuple[str, ...]) -> bool:
    """Whether the factors are the initial ones; a stack joined from experts counts as trained."""
    if found != (name,):
        return False
    pairs = zip(start.factors(name), end.factors(name), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


# --- the original model -------------------------------------------------------------------------


def _original(
    origin: AdapterOrigin,
    start: Adapter,
    end: Adapter,
    starts_at_zero: bool,
    base: Opened | None,
) -> tuple[str | None, str | None]:
    """Reference and revision of the model that the result is an adapter of; None for one in
    memory."""
    if base is not None and not isinstance(base, str):
        return _open_reference(base)
    if base is not None:
        parsed = parse_reference(base)
        if isinstance(parsed, HubReference) and not parsed.folder:
            return parsed.repo, parsed.revision
        return base, None
    for record in (origin.record, record_beside(end.base), record_beside(start.base)):
        known = record.get("base") or {}
        if known.get("reference"):
            return known["reference"], known.get("commit")
    on_the_original = starts_at_zero or origin.layout == "anchor"
    if on_the_original or any(_decomposes_at_load(one) for one in (start, end)):
        name = end.base or start.base
        if name is not None:
            return name, end.config.get("revision")
    if origin.folder is None:
        return None, None
    raise OptionError(
        f"{start.given} does not tell the original model ({end.base} may be the rewritten one), "
        "which the converted adapter names as its base; give it with `base`"
    )


def _open_reference(base: Opened) -> tuple[str | None, str | None]:
    """Of a model that is open its path or Hub id; None for one in memory."""
    whole = open_model(base)
    if whole.ref.is_in_memory:
        return whole.config.get("_name_or_path") or None, None
    if whole.ref.commit is None:
        return whole.ref.resolved, None
    return whole.ref.given.removeprefix("hf://").partition("@")[0], whole.ref.commit


def _told(
    origin: AdapterOrigin, last: AdapterOrigin, reference: str | None, revision: str | None
) -> dict[str, Any]:
    """The part of geoscope.json that names the base and both adapters."""
    known = origin.record.get("base") or {}
    same = (known.get("reference"), known.get("commit")) == (reference, revision)
    folders = {"initial": origin.resolved, "trained": last.resolved}
    base = {"reference": None if reference is None else _whole(reference), "commit": revision}
    return {"base": {**base, "sha256": known.get("sha256", {}) if same else {}}, "from": folders}


def _whole(reference: str) -> str:
    """A folder by its whole path; a Hub id as it is."""
    path = local_path(reference)
    return str(path.resolve()) if exists(path) else reference


def _decomposes_at_load(adapter: Adapter) -> bool:
    """Whether PEFT itself initialised it, from the original model under that model's name."""
    return isinstance(adapter.config.get("init_lora_weights"), str)


# --- what is written ----------------------------------------------------------------------------
