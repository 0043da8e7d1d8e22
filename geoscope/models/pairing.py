"""Which tensor of the tuned model is which tensor of the base? On headers alone.

First the exact name, then the canonical name; never by position, never by substring. Only tensors
of equal shape are compared. Everything that is left is listed with its reason, and matrices in
scope that lack a comparison are called missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from geoscope.errors import PairingError, first_names
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.prefixes import joining_rule
from geoscope.models.scope import MATRIX, VECTOR, Scope
from geoscope.models.split import narrowed
from geoscope.models.ungathered import empty_reason, ungathered
from geoscope.names import (
    NameMap,
    Selection,
    in_natural_order,
    is_embedding,
    is_output_head,
    layer_index,
    module_kind,
)
from geoscope.records import Pairing, Rename, ShapeMismatch, Skipped, TensorInfo, WeightPair

__all__ = ["common_rows", "is_resized", "match", "pair"]

BASE = "base"
TUNED = "tuned"


def pair(
    base: Checkpoint,
    tuned: Checkpoint,
    selection: Selection,
    names: NameMap = NameMap(),  # noqa: B008 - frozen
) -> Pairing:
    """The correspondence of two checkpoints under a selection of names.

    Raises PairingError when two names of one side mean the same tensor, or when nothing is left to
    compare.
    """
    for side in (base, tuned):
        _refuse_repeats(side, names)
    matching = match(base.tensors, tuned.tensors, names)
    scope = Scope.of(selection, (*base.tensors.values(), *tuned.tensors.values()))
    ledger = _Ledger(scope, names, _tied(base, tuned, names))
    for one, other in matching.pairs:
        ledger.enter_pair(one, other)
    for info in matching.base_only:
        ledger.enter_alone(info, BASE)
    for info in matching.tuned_only:
        ledger.enter_alone(info, TUNED)
    pairing = ledger.pairing()
    if not pairing.matrices and not (selection.include and pairing.vectors):
        raise _nothing(base, tuned, matching, pairing, selection)
    return pairing


def _refuse_repeats(checkpoint: Checkpoint, names: NameMap) -> None:
    seen: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name in checkpoint.tied_to:
            continue
        other = seen.setdefault(names.canonical(name)[0], name)
        if other != name:
            raise PairingError(
                f"{checkpoint.ref.given}: {other} and {name} mean the same tensor "
                f"({names.canonical(name)[0]}); keep one of them"
            )


# --- names --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """Pairs of stored tensors, and what is left on each side; sorted by name."""

    pairs: tuple[tuple[TensorInfo, TensorInfo], ...]
    base_only: tuple[TensorInfo, ...]
    tuned_only: tuple[TensorInfo, ...]


def match(
    base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], names: NameMap
) -> Matching:
    """First by the exact name, then by the canonical one; shapes may differ."""
    partners = {name: name for name in base if name in tuned}
    left = {names.canonical(name)[0]: name for name in tuned if name not in partners}
    for name in base:
        if name not in partners and names.canonical(name)[0] in left:
            partners[name] = left.pop(names.canonical(name)[0])
    taken = set(partners.values())
    return Matching(
        pairs=tuple((base[name], tuned[partners[name]]) for name in in_natural_order(partners)),
        base_only=tuple(base[name] for name in in_natural_order(base) if name not in partners),
        tuned_only=tuple(tuned[name] for name in in_natural_order(tuned) if name not in taken),
    )


def _rename(base: str, tuned: str, names: NameMap) -> Rename:
    """The rules that made one name of the two; what both share made no difference."""
    mine, theirs = names.canonical(base)[1], names.canonical(tuned)[1]
    rules = [rule for rule in (*mine, *theirs) if (rule in mine) != (rule in theirs)]
    return Rename(base, tuned, ", ".join(rules or dict.fromkeys((*mine, *theirs))))


def _tied(base: Checkpoint, tuned: Checkpoint, names: NameMap) -> dict[str, str]:
    """canonical name → why it is left out, for a tensor that repeats another one on either side."""
    sides = [
        {names.canonical(name)[0]: kept for name, kept in side.tied_to.items()}
        for side in (base, tuned)
    ]
    reasons: dict[str, str] = {}
    for mine, theirs, side in ((sides[0], sides[1], BASE), (sides[1], sides[0], TUNED)):
        for name, kept in mine.items():
            if name in theirs:
                reasons[name] = f"tied to {sides[0][name]}: counted once"
            else:
                reasons[name] = f"tied to {kept} in {side}: no counterpart of its own"
    return reasons


# --- scope --------------------------------------------------------------------------------------


@dataclass
class _Ledger:
    """Takes the pairs and the left-over tensors one by one and enters each in one list."""

    scope: Scope
    names: NameMap
    tied: Mapping[str, str]
    pairs: dict[str, list[WeightPair]] = field(default_factory=lambda: {MATRIX: [], VECTOR: []})
    alone: dict[str, list[str]] = field(default_factory=lambda: {BASE: [], TUNED: []})
    mismatches: list[ShapeMismatch] = field(default_factory=list[ShapeMismatch])
    skipped: list[Skipped] = field(default_factory=list[Skipped])
    renamed: list[Rename] = field(default_factory=list[Rename])
    missing: list[str] = field(default_factory=list[str])

    def enter_pair(self, base: TensorInfo, tuned: TensorInfo) -> None:
        if self._skip_known(base):
            return
        if base.name != tuned.name:
            self.renamed.append(_rename(base.name, tuned.name, self.names))
        if (reason := empty_reason(base, tuned)) is not None:
            self._enter_empty(base, tuned, reason)
            return
        if base.shape != tuned.shape:
            self.mismatches.append(ShapeMismatch(base.name, base.shape, tuned.shape))
            if self.scope.wants_matrix(base) or self.scope.wants_matrix(tuned):
                self.missing.append(base.name)
            return
        place = self.scope.place_pair(base, tuned)
        if not isinstance(place, Skipped):
            self.pairs[place].append(_weight_pair(base, tuned))
            return
        self.skipped.append(place)
        if place.missing:
            self.missing.append(place.name)

    def _enter_empty(self, base: TensorInfo, tuned: TensorInfo, reason: str) -> None:
        """A pair with an empty side; of two empty ones the name alone tells a matrix."""
        inside = layer_index(base.name) is not None and base.name.endswith("weight")
        is_missing = self.scope.wants_matrix(base) or self.scope.wants_matrix(tuned)
        is_missing |= inside and base.shape == tuned.shape
        self.skipped.append(Skipped(base.name, reason, missing=is_missing))
        if is_missing:
            self.missing.append(base.name)

    def enter_alone(self, info: TensorInfo, side: str) -> None:
        if self._skip_known(info):
            return
        self.alone[side].append(info.name)
        if self.scope.wants_matrix(info):
            self.missing.append(info.name)

    def _skip_known(self, info: TensorInfo) -> bool:
        """Whether it is not a tensor of its own: tied to another, or the scale of one."""
        reason = self.tied.get(self.names.canonical(info.name)[0])
        if reason is not None:
            self.skipped.append(Skipped(info.name, reason))
        return reason is not None

    def pairing(self) -> Pairing:
        return Pairing(
            matrices=tuple(self.pairs[MATRIX]),
            vectors=tuple(self.pairs[VECTOR]),
            base_only=tuple(self.alone[BASE]),
            tuned_only=tuple(self.alone[TUNED]),
            shape_mismatch=tuple(self.mismatches),
            skipped=tuple(self.skipped),
            renamed=tuple(self.renamed),
            missing=tuple(self.missing),
        )


def _weight_pair(base: TensorInfo, tuned: TensorInfo) -> WeightPair:
    name = base.name
    return WeightPair(name, layer_index(name), module_kind(name), base.shape, base, tuned)


# --- resized vocabularies -----------------------------------------------------------------------


def common_rows(
    base: Checkpoint, tuned: Checkpoint, names: NameMap
) -> tuple[Checkpoint, Checkpoint, tuple[str, ...]]:
    """Both checkpoints with the rows of embeddings and output heads that both have; and remarks."""
    notes: list[str] = []
    for one, other in match(base.tensors, tuned.tensors, names).pairs:
        if one.name in base.tied_to and other.name in tuned.tied_to:
            continue  # counted under the other name
        rows, others = one.shape[:1], other.shape[:1]
        if rows != others and is_resized(one.name, one.shape, other.shape):
            common = min(*rows, *others)
            base, tuned = narrowed(base, one.name, common), narrowed(tuned, other.name, common)
            notes.append(
                f"{one.name}: {rows[0]} rows in base, {others[0]} in tuned; the first {common} are "
                "compared"
            )
    return base, tuned, tuple(notes)


def is_resized(name: str, base: tuple[int, ...], tuned: tuple[int, ...]) -> bool:
    """Whether two shapes of an embedding or output head differ in the number of rows alone."""
    is_vocabulary = is_embedding(name) or is_output_head(name)
    return is_vocabulary and len(base) == len(tuned) <= 2 and base[1:] == tuned[1:] != base


# --- nothing to compare -------------------------------------------------------------------------


def _nothing(
    base: Checkpoint,
    tuned: Checkpoint,
    matching: Matching,
    pairing: Pairing,
    selection: Selection,
) -> PairingError:
    """Why no matrix is left: no common names, other shapes, or a selection that takes none."""
    if pairing.missing and (rule := _rule_for(matching, base, tuned)) is not None:
        return PairingError(
            f"nothing to compare: the names of {base.ref.given} and {tuned.ref.given} differ in "
            f"their leading part; {rule}"
        )
    if not matching.pairs:
        return PairingError(
            f"nothing to compare: no tensor of {base.ref.given} has a partner in "
            f"{tuned.ref.given}; names are {_examples(base.tensors)} against "
            f"{_examples(tuned.tensors)}. Are they the same architecture?"
        )
    for side in (base, tuned):
        if pairing.missing and (line := ungathered(side.tensors)) is not None:
            return PairingError(f"nothing to compare: `{side.ref.given}`: {line}")
    reshaped = [item for item in pairing.shape_mismatch if item.name in pairing.missing]
    if reshaped:
        first = reshaped[0]
        return PairingError(
            f"nothing to compare: {len(reshaped)} matrices in scope differ in shape, first "
            f"{first.name}: base {first.base}, tuned {first.tuned}; only tensors of equal shape "
            "are compared; "
            + (
                "`allow_vocab_resize` compares the rows that both have"
                if all(is_resized(one.name, one.base, one.tuned) for one in reshaped)
                else "give the base that the tuned model was trained from"
            )
        )
    matrices = [info.name for info, _ in matching.pairs if len(info.shape) == 2]
    if pairing.missing:
        return PairingError(
            f"nothing to compare: for {len(pairing.missing)} weights in scope, the other model has "
            f"no readable counterpart, first {pairing.missing[0]}; names look like "
            f"{_examples(matrices or base.tensors)}"
        )
    return PairingError(
        f"nothing to compare: no matrix passes {_selected(selection)}; names look like "
        f"{_examples(matrices or base.tensors)}"
    )


def _rule_for(matching: Matching, base: Checkpoint, tuned: Checkpoint) -> str | None:
    """The `--map-name` that gives most of the tensors a partner; None without one."""
    left = [info.name for info in matching.base_only], [info.name for info in matching.tuned_only]
    found = joining_rule(*left)
    if found is None or 2 * found[1] < min(len(base.tensors), len(tuned.tensors)):
        return None
    rule, count = found
    return f"give `map_name` '{rule}', under which {count} of them agree"


def _examples(names: Iterable[str]) -> str:
    ordered = in_natural_order(names)
    inside = [name for name in ordered if layer_index(name) is not None]
    return first_names(inside or ordered)


def _selected(selection: Selection) -> str:
    options = [f"`include` {pattern!r}" for pattern in selection.include]
    options += [f"`exclude` {pattern!r}" for pattern in selection.exclude]
    if selection.layers is not None:
        options.append("`layers` " + ",".join(str(layer) for layer in sorted(selection.layers)))
    return " ".join(options) or "the default scope (2-D weights but embeddings and output head)"
