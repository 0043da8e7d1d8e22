"""Which candidate is a model made from? Roles of the candidates, the answer, and a family tree.

Weights are numbered as in `kin`: 0 is the model. Of three weights the one with the widest angle
lies between the others, where that angle is 90° or more, as updates that know nothing of one
another have it; where no angle is, the three meet in a weight that is not among them. What lacks a
tensor that both others have, entry by entry, does not lie between them. Which end is the older one
distances do not tell; norms do, where training added independent updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, permutations

from geoscope.metrics.copies import Copy, Merge, merge_of, narrowed
from geoscope.metrics.distance import far_code
from geoscope.metrics.judging import Check, MatrixVerdict, explained
from geoscope.metrics.kin import Estimate, Kin
from geoscope.thresholds import THRESHOLDS, limits_in_force

__all__ = ["Family", "Node", "family_of"]

_SURE = 2.0  # standard errors between a number and its limit


@dataclass(frozen=True)
class Node:
    """Where a weight stands in the tree.

    parent: the weight above it; None of the root.
    beside: the weight with which it shares a stem below the parent, a model that is not given.
    """

    parent: int | None = None
    beside: int | None = None


@dataclass(frozen=True)
class Family:
    """The answer.

    code: one of LINEAGE.codes (`kinds.py`).
    roles: of each candidate.
    parent: the candidate that the model is made from, where one is.
    angles: at each candidate between the model and what lies beyond.
    tree: weight → its node, of those that are related.
    merge, copies: what was found of combinations and of copies.
    is_clear: whether a parent was found and more matrices are not expected to change it.
    checks: every condition that was looked at.
    """

    code: str
    roles: Mapping[int, str]
    parent: int | None = None
    angles: Mapping[int, Estimate] = field(default_factory=dict[int, Estimate])
    tree: Mapping[int, Node] = field(default_factory=dict[int, Node])
    merge: Merge | None = None
    copies: Mapping[int, Copy] = field(default_factory=dict[int, Copy])
    is_clear: bool = True
    checks: tuple[Check, ...] = ()

    @property
    def explain(self) -> tuple[dict[str, object], ...]:
        return explained(
            [MatrixVerdict(self.code, None, "", "", (check,)) for check in self.checks]
        )


def family_of(kin: Kin, given: Mapping[str, float] | None = None) -> Family:
    """What the sample says. given: limits in place of the defaults, by name."""
    limits = limits_in_force(given)
    far = {i: far_code(*kin.cosine(i), limits) for i in kin.candidates}
    roles = {i: code for i, code in far.items() if code is not None}
    relations = _Relations(kin, limits, tuple(i for i in kin.candidates if i not in roles))
    if not relations.related:
        codes = set(roles.values())
        code = "UNRELATED" if codes == {"UNRELATED"} else "TOO_FAR"
        checks = tuple(_far_checks(kin, limits))
        return Family(code, roles, is_clear=_is_far_clear(kin, limits), checks=checks)
    return _answer(kin, relations, roles)


def _answer(kin: Kin, relations: _Relations, far: Mapping[int, str]) -> Family:
    limits = relations.limits
    placed = _Placed.of(relations)
    roles = dict(placed.roles)
    copies = {i: copy for i in relations.related if (copy := narrowed(kin, i)) is not None}
    code, parent, merge = placed.code, placed.parent, None
    is_clear = _is_far_clear(kin, limits)
    if relations.same:
        code, parent, is_clear = "COPY", relations.same[0], False
        roles |= dict.fromkeys(relations.same, "COPY")
    elif (copy := _nearest_copy(kin, copies, limits["words.quantised_copy"])) is not None:
        code, parent = "QUANTISED", copy
        roles[copy] = "QUANTISED"
    elif (merge := merge_of(kin, relations.kept, limits)) is not None:
        code, parent = "MERGE", None
        roles = dict.fromkeys(roles, "RELATIVE") | dict.fromkeys(merge.weights, "MERGED")
    else:
        is_clear = is_clear and parent is not None and relations.is_clear
    roles |= {twin: roles[i] for twin, i in relations.twins.items()}
    return Family(
        code=code,
        roles={**far, **roles},
        parent=parent,
        angles=relations.angles_beyond(parent if parent is not None else placed.parent),
        tree=_tree(relations, placed.root),
        merge=merge,
        copies=copies,
        is_clear=is_clear,
        checks=(*_far_checks(kin, limits), *_checks(relations, copies, merge, parent)),
    )


def _nearest_copy(kin: Kin, copies: Mapping[int, Copy], limit: float) -> int | None:
    held = [i for i, copy in copies.items() if limit <= copy.share <= 1 / limit]
    return min(held, key=kin.distance, default=None)


# --- three weights --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Relations:
    """How the related candidates and the model lie to one another."""

    kin: Kin
    limits: Mapping[str, float]
    related: tuple[int, ...]

    @cached_property
    def same(self) -> tuple[int, ...]:
        """Candidates with the values of the model."""
        return tuple(i for i in self.related if not self.kin.squared[0, i])

    @cached_property
    def twins(self) -> dict[int, int]:
        """Candidate → an earlier one with its values."""
        return {
            j: i
            for i, j in reversed([*combinations(self.related, 2)])
            if not self.kin.squared[i, j]
        }

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Candidates whose values no other has."""
        return tuple(i for i in self.related if i not in self.twins and i not in self.same)

    @cached_property
    def _vertices(self) -> dict[tuple[int, frozenset[int]], Estimate]:
        return {
            (at, frozenset((a, b))): self.kin.vertex(at, a, b)
            for three in combinations((0, *self.kept), 3)
            for at, a, b in permutations(three)
            if a < b
        }

    def vertex(self, at: int, a: int, b: int) -> Estimate:
        return self._vertices[at, frozenset((a, b))]

    def middle(self, a: int, b: int, c: int) -> int | None:
        """The one between the others; None where none is."""
        at = min((a, b, c), key=lambda i: self.vertex(i, *({a, b, c} - {i})).value)
        others = {a, b, c} - {at}
        if self.vertex(at, *others).value > self.limits["lineage.between"]:
            return None
        is_passed_over = 0 in others and self.kin.is_passed_over(at, *(others - {0}))
        return None if is_passed_over else at

    def age(self, i: int, j: int) -> int:
        """1 where i is the older one by its norm, −1 where j is, 0 where neither can be told."""
        grown, least = self.kin.growth(i, j), self.limits["lineage.growth"]
        limit = max(least, _SURE * grown.error)
        return 0 if abs(grown.value) < limit else 1 if grown.value > 0 else -1

    @cached_property
    def is_clear(self) -> bool:
        """Whether every widest angle is clearly the widest, and clearly on its side."""
        limit = self.limits["lineage.between"]
        for three in combinations((0, *self.kept), 3):
            first, second, _ = sorted(self.vertex(i, *(set(three) - {i})) for i in three)
            is_apart = abs(first.value - limit) > _SURE * first.error
            is_first = second.value - first.value > _SURE * max(first.error, second.error)
            if not (is_apart and (is_first or first.value > limit)):
                return False
        return True

    def angles_beyond(self, parent: int | None) -> dict[int, Estimate]:
        """At each candidate the angle between the model and the parent, at the parent the widest
        between the model and another."""
        found: dict[int, Estimate] = {}
        for i in self.kept:
            others = self.kept if i == parent or parent not in self.kept else (parent,)
            seen = [self.vertex(i, 0, j) for j in others if j is not None and j != i]
            found |= {i: min(seen)} if seen else {}
        return found


# --- who is who -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placed:
    """The answer from the places alone."""

    code: str
    parent: int | None
    root: int | None
    roles: Mapping[int, str]

    @classmethod
    def of(cls, relations: _Relations) -> _Placed:
        if not relations.kept:
            return cls("COPY", None, None, {})
        code, parent = _parent(relations)
        if parent is None:
            near = set(_neighbours(relations))
            role = {"EITHER_WAY": "DESCENDANT"}.get(code, "NEAR")
            roles = {i: role if i in near else "RELATIVE" for i in relations.kept}
            return cls(code, None, None, roles)
        root = _root(relations, parent)
        roles = {i: _role(relations, i, parent, root) for i in relations.kept}
        roles |= {parent: "NEAR"} if code == "EITHER_WAY" else {}
        return cls(code, parent, root, roles)


def _neighbours(relations: _Relations) -> list[int]:
    """Candidates with none between them and the model."""
    kept = relations.kept
    near = [i for i in kept if all(relations.middle(0, i, j) != j for j in kept if j != i)]
    return near or [min(kept, key=relations.kin.distance)]


def _parent(relations: _Relations) -> tuple[str, int | None]:
    """The code and the parent."""
    near = _neighbours(relations)
    older = [i for i in near if relations.age(i, 0) >= 0]
    if not older:
        return "EITHER_WAY", near[0] if len(near) == 1 else None
    if len(older) == 1:
        return _along(relations, older[0]), older[0]
    eldest = [i for i in older if all(relations.age(i, j) == 1 for j in older if j != i)]
    if eldest:
        return _along(relations, eldest[0]), eldest[0]
    pairs = combinations(older, 2)
    is_between = all(relations.middle(0, i, j) == 0 for i, j in pairs)
    return "BETWEEN" if is_between else "NO_PARENT", None


def _along(relations: _Relations, parent: int) -> str:
    """LINE where the model goes on in the direction in which others lie behind the parent."""
    beyond = [relations.vertex(parent, 0, j).value for j in relations.kept if j != parent]
    is_straight = any(cosine < -relations.limits["lineage.straight"] for cosine in beyond)
    return "LINE" if is_straight else "DESCENDS"


def _root(relations: _Relations, parent: int) -> int | None:
    """The eldest of all by its norm; None where norms do not tell."""
    if relations.age(parent, 0) != 1:
        return None
    energy = relations.kin.energies.sum(0)
    eldest = min(relations.kept, key=lambda i: float(energy[i]))
    others = [i for i in relations.kept if i != eldest] if eldest == parent else [parent]
    return eldest if all(relations.age(eldest, i) == 1 for i in others) else None


def _role(relations: _Relations, i: int, parent: int, root: int | None) -> str:
    if i == parent:
        return "PARENT"
    middle = relations.middle(0, parent, i)
    if middle == 0:
        return "DESCENDANT" if root is not None else "RELATIVE"
    if root is None:
        return "BEYOND" if middle == parent else "RELATIVE"
    if i == root or (parent != root and relations.middle(parent, i, root) == i):
        return "ANCESTOR"
    is_below = parent == root or relations.middle(parent, i, root) == parent
    return "SIBLING" if middle is None or is_below else "RELATIVE"


def _tree(relations: _Relations, root: int | None) -> dict[int, Node]:
    """The shortest tree of squared distances, from its root; stems that several share told."""
    kept, squared = relations.kept, relations.kin.squared
    if not kept:
        return {}
    if root is None:
        root = max(kept, key=relations.kin.distance)
    tree, left = {root: Node()}, {0, *kept} - {root}
    while left:
        child, parent = min(
            ((i, j) for i in left for j in tree), key=lambda pair: float(squared[pair[0], pair[1]])
        )
        tree[child] = _node(relations, tree, child, parent)
        left.remove(child)
    return tree


def _node(relations: _Relations, tree: Mapping[int, Node], child: int, nearest: int) -> Node:
    """Below the nearest, below what is above that, or beside one that shares a stem."""
    limit, above = relations.limits["lineage.between"], tree[nearest].parent
    parent = nearest
    if above is not None and relations.vertex(nearest, child, above).value > limit:
        parent = above
    stems = {
        other: cosine
        for other, node in tree.items()
        if node.parent == parent
        if (cosine := relations.vertex(parent, child, other).value) > limit
    }
    return Node(parent, beside=max(stems, key=lambda other: stems[other], default=None))


# --- conditions -----------------------------------------------------------------------------------


def _is_far_clear(kin: Kin, limits: Mapping[str, float]) -> bool:
    cosines = [kin.cosine(i) for i in kin.candidates]
    limit = limits["too_far.cosine"]
    return all(abs(one.value - limit) > 3 * one.error for one in cosines)


def _check(code: str, name: str, value: float, sign: str, key: str, limit: float) -> Check:
    return Check(code, name, value, sign, limit, THRESHOLDS[key].standing)


def _far_checks(kin: Kin, limits: Mapping[str, float]) -> list[Check]:
    key = "too_far.cosine"
    return [
        _check("TOO_FAR", "c", kin.cosine(i).value, "<", key, limits[key]) for i in kin.candidates
    ]


def _checks(
    relations: _Relations, copies: Mapping[int, Copy], merge: Merge | None, parent: int | None
) -> list[Check]:
    limits = relations.limits
    found: list[Check] = []

    def add(code: str, name: str, value: float, sign: str, key: str) -> None:
        found.append(_check(code, name, value, sign, key, limits[key]))

    for copy in copies.values():
        add("QUANTISED", "rounding/distance", copy.share, "≥", "words.quantised_copy")
    if merge is not None:
        add("MERGE", "residual/rounding", merge.noise, "≤", "lineage.merge_noise")
        add("MERGE", "residual/distance", merge.share, "≤", "lineage.merge_share")
    for i in relations.kept:
        grown = relations.kin.growth(i, 0).value
        add("DESCENDS", "growth", grown, "≥", "lineage.growth")
    for other in relations.kept:
        if parent in relations.kept and other != parent:
            cosine = relations.vertex(parent, 0, other).value
            add("DESCENDS", "cos at the parent", cosine, "≤", "lineage.between")
            found.append(
                _check(
                    *("LINE", "cos at the parent", cosine, "<", "lineage.straight"),
                    -limits["lineage.straight"],
                )
            )
    return found
