"""A model and its candidates: opened, matched by name, read matrix by matrix."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geoscope.engine import told_failure
from geoscope.errors import PairingError
from geoscope.linalg.changes import Side, expected_unchanged, nonfinite_entries, unchanged
from geoscope.linalg.displacements import displacement_gram
from geoscope.linalg.isotropic import isotropic_spread
from geoscope.metrics.kin import Kin
from geoscope.metrics.providers import sides
from geoscope.models.checkpoint import Checkpoint
from geoscope.names import NameMap, is_embedding, is_output_head
from geoscope.records import Pairing, WeightPair
from geoscope.verbs.lineage.options import LineageOptions
from geoscope.verbs.pairs.matching import match_models

__all__ = ["Candidate", "Looked", "Relatives", "kin_of", "looked", "matched"]

_BLOCK = 1 << 20  # entries of an embedding that are compared at a time


@dataclass(frozen=True)
class Candidate:
    """A candidate in the parts in which it is compared with the model.

    number: as in `provenance.refs`.
    model: the model in the same parts.
    pairs: name of the model's tensor → the pair.
    """

    number: int
    own: Checkpoint
    model: Checkpoint
    pairing: Pairing
    pairs: Mapping[str, WeightPair]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Relatives:
    """Candidates that have matrices in common with the model.

    names: of the model's matrices that all of them have, in the order in which they are taken.
    others: number → why a candidate is not among them.
    """

    model: Checkpoint
    candidates: tuple[Candidate, ...]
    names: tuple[str, ...]
    others: Mapping[int, str] = field(default_factory=dict[int, str])

    def wanted(self, names: Sequence[str]) -> list[tuple[Checkpoint, list[str]]]:
        """What is read of each model for these matrices."""
        own = [(one.own, [one.pairs[name].base.name for name in names]) for one in self.candidates]
        return [(self.candidates[0].model, [*names]), *own]

    def embeddings(self, *, all_of_them: bool) -> tuple[dict[str, bool], ...]:
        """Of each candidate embeddings and output heads by their name in the model, and whether
        they are equal in all rows that both have; those that would have to be fetched only with
        `all_of_them`."""
        return tuple(
            {
                mine: _is_equal(candidate, mine, theirs)
                for mine, theirs in _vocabularies(candidate)
                if all_of_them or not _has_to_be_fetched(candidate, mine, theirs)
            }
            for candidate in self.candidates
        )


def matched(
    model: Checkpoint, candidates: Sequence[Checkpoint], options: LineageOptions
) -> Relatives:
    """The candidates and what they have in common with the model.

    One that lacks more than half of what another has in common is left aside. Raises PairingError
    where none has a matrix in common.
    """
    found: list[Candidate] = []
    others: dict[int, str] = {}
    failure: PairingError | None = None
    for number, own in enumerate(candidates, start=1):
        try:
            found.append(_candidate(number, own, model, options))
        except PairingError as error:
            others[number] = str(error)
            failure = error
    if not found and failure is not None:
        raise failure
    most = max(len(one.pairs) for one in found)
    for one in found:
        if 2 * len(one.pairs) < most:
            others[one.number] = f"{len(one.pairs)} of {most} matrices have a counterpart"
    kept = tuple(one for one in found if one.number not in others)
    shared = [name for name in kept[0].pairs if all(name in one.pairs for one in kept)]
    if not shared:
        raise PairingError(
            "nothing to compare: the candidates have no matrix of the model's in common; give "
            "them one by one"
        )
    return Relatives(model, kept, _order(kept[0].model, shared, options.seed), others)


def _candidate(
    number: int, own: Checkpoint, model: Checkpoint, options: LineageOptions
) -> Candidate:
    own, parts, pairing, notes = match_models(own, model, options.of_pairs)
    pairs = {pair.tuned.name: pair for pair in pairing.matrices}
    if not pairs:
        raise PairingError("nothing to compare: norms and biases alone are in scope")
    return Candidate(number, own, parts, pairing, pairs, notes)


def _order(model: Checkpoint, names: Sequence[str], seed: int) -> tuple[str, ...]:
    """At random; of a base with an adapter what the adapter changes comes first."""
    order = list(names)
    random.Random(seed).shuffle(order)
    return tuple(sorted(order, key=model.leaves))


# --- embeddings -----------------------------------------------------------------------------------


def _vocabularies(candidate: Candidate) -> list[tuple[str, str]]:
    """Embeddings and heads of the model with those of the candidate of the same name."""
    names = NameMap()
    theirs = {names.canonical(name)[0]: name for name in candidate.own.tensors}
    found = [
        (name, theirs[names.canonical(name)[0]])
        for name, info in candidate.model.tensors.items()
        if (is_embedding(name) or is_output_head(name)) and len(info.shape) == 2
        if names.canonical(name)[0] in theirs and name not in candidate.model.tied_to
    ]
    shapes = candidate.model.tensors, candidate.own.tensors
    return [
        (mine, other)
        for mine, other in found
        if shapes[0][mine].shape[1:] == shapes[1][other].shape[1:]
    ]


def _has_to_be_fetched(candidate: Candidate, mine: str, theirs: str) -> bool:
    return bool(candidate.model.bytes_to_fetch([mine]) or candidate.own.bytes_to_fetch([theirs]))


def _is_equal(candidate: Candidate, mine: str, theirs: str) -> bool:
    """Whether the common rows are equal; nothing is read after the first difference."""
    candidate.model.fetch([mine])
    candidate.own.fetch([theirs])
    rows = (candidate.model.tensors[mine].shape[0], candidate.own.tensors[theirs].shape[0])
    count = min(rows) * candidate.model.tensors[mine].shape[1]
    for begin in range(0, count, _BLOCK):
        end = min(begin + _BLOCK, count)
        model = candidate.model.read_part(mine, begin, end)
        if not torch.equal(model.double(), candidate.own.read_part(theirs, begin, end).double()):
            return False
    return True


# --- matrices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looked:
    """One matrix of all of them.

    gram: G of `linalg.displacements`.
    noise: squared rounding of each, the model first.
    coarser: of model and candidates, as in `Kin`.
    unchanged: share of entries that are those of each candidate, and what an isotropic update of
    the same size leaves; None where a grid hides them.
    grids: what each lies on.
    """

    name: str
    pairs: tuple[WeightPair, ...]
    gram: Tensor
    noise: tuple[float, ...]
    coarser: tuple[tuple[float, ...], tuple[float, ...]]
    unchanged: tuple[tuple[float, float] | None, ...]
    grids: tuple[str | None, ...]


def looked(relatives: Relatives, name: str, failed: dict[str, str]) -> Looked | None:
    """The matrix of this name; None, and the reason in `failed`, where it has no numbers."""
    pairs = tuple(one.pairs[name] for one in relatives.candidates)
    sources = [relatives.candidates[0].model, *(one.own for one in relatives.candidates)]
    names = [name, *(pair.base.name for pair in pairs)]
    weights = [source.read(each) for source, each in zip(sources, names, strict=True)]
    if bad := sum(map(nonfinite_entries, weights)):
        failed[name] = f"{bad} entries are NaN or Inf"
        return None
    with told_failure(failed, name):
        every = [
            sides(weight[None], [source.rounding(each)])[0]
            for weight, source, each in zip(weights, sources, names, strict=True)
        ]
        return _looked(name, pairs, weights, every)
    return None


def _looked(
    name: str, pairs: tuple[WeightPair, ...], weights: Sequence[Tensor], every: Sequence[Side]
) -> Looked:
    model, *others = every
    gram = displacement_gram(weights[0], weights[1:])
    coarser = [
        tuple(one.noise**2 if _is_coarser(one, two) else 0.0 for one, two in both)
        for both in ([(model, other) for other in others], [(other, model) for other in others])
    ]
    return Looked(
        name=name,
        pairs=pairs,
        gram=gram,
        noise=tuple(one.noise**2 for one in every),
        coarser=(coarser[0], coarser[1]),
        unchanged=tuple(
            _unchanged(weights[0], weights[i], model, every[i], float(gram[i, i]))
            for i in range(1, len(weights))
        ),
        grids=tuple(None if one.grid is None else one.grid.name for one in every),
    )


def _is_coarser(one: Side, other: Side) -> bool:
    if one.is_quantised != other.is_quantised:
        return one.is_quantised
    return not one.is_quantised and one.fmt.fraction_bits < other.fmt.fraction_bits


def _unchanged(
    model: Tensor, other: Tensor, after: Side, before: Side, squared: float
) -> tuple[float, float] | None:
    if after.is_quantised or before.is_quantised:
        return None
    spread = isotropic_spread(before, after, (squared / model.numel()) ** 0.5)
    expected = expected_unchanged(before, after.fmt, spread).relative
    return unchanged(other, model).relative, expected


def kin_of(rows: Sequence[Looked], embeddings: Sequence[Mapping[str, bool]] = ()) -> Kin:
    """All matrices together. embeddings: of each candidate whether they are the model's."""
    names = dict.fromkeys(name for known in embeddings for name in known)
    count = len(rows[0].pairs)
    same = [[known.get(name, False) for known in embeddings] for name in names]
    return Kin(
        gram=torch.stack([row.gram for row in rows]),
        noise=torch.tensor([row.noise for row in rows], dtype=torch.float64),
        coarser=torch.tensor([row.coarser for row in rows], dtype=torch.float64).movedim(0, 1),
        parameters=torch.tensor(
            [row.pairs[0].shape[0] * row.pairs[0].shape[1] for row in rows], dtype=torch.float64
        ),
        same=torch.tensor(same, dtype=torch.bool).reshape(-1, count),
    )
