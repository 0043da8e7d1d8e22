"""From what was looked at to a Report of kind `lineage`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from geoscope._version import __version__
from geoscope.errors import first_names
from geoscope.metrics.family import Family
from geoscope.metrics.kin import Kin
from geoscope.names import layer_index, module_kind
from geoscope.records import (
    Collected,
    Coverage,
    LayerRecord,
    Layers,
    ModelRef,
    Overlap,
    Provenance,
    Report,
    Run,
    Skipped,
    Status,
    Summary,
    Verdict,
)
from geoscope.thresholds import limits_in_force
from geoscope.verbs.lineage.options import LineageOptions
from geoscope.verbs.lineage.relatives import Looked, Relatives, kin_of
from geoscope.verbs.lineage.told import told

__all__ = ["IDS", "KIND", "Found", "lineage_report"]

KIND = "lineage"
_OTHER = "OTHER_SHAPES"
IDS = (
    *("base_cosine", "relative_update", "precision_ratio", "update_sparsity", "growth"),
    *("lineage_angle", "equal_embeddings", "copy_share", "merge_weight"),
)


@dataclass(frozen=True)
class Found:
    """What the verb found out.

    refs: of the model and of every candidate.
    rows: of each matrix that was read.
    embeddings: of each candidate whether embeddings and heads are the model's, by name.
    failed: matrix → why it has no numbers.
    """

    refs: Sequence[ModelRef]
    relatives: Relatives
    rows: Sequence[Looked]
    family: Family
    embeddings: Sequence[Mapping[str, bool]]
    failed: Mapping[str, str]

    @property
    def kin(self) -> Kin:
        return kin_of(self.rows)

    def number(self, i: int) -> int:
        """The candidate's number in `refs`, of its place in `kin`; 0 is the model in both."""
        return self.relatives.candidates[i - 1].number if i else 0


def lineage_report(
    found: Found, options: LineageOptions, *, argv: Sequence[str], seconds: float
) -> Report:
    """The report."""
    several = len(found.refs) > 2
    runs = tuple(
        _run(found, i, options) for i in range(1, len(found.relatives.candidates) + 1)
    ) + tuple(_aside(number, reason) for number, reason in found.relatives.others.items())
    first = runs[0]
    return Report(
        kind=KIND,
        provenance=Provenance(
            tool_version=__version__,
            argv=tuple(argv),
            refs=tuple(found.refs),
            device="cpu",
            compute_dtype="float64",
            seed=options.seed,
            parameters=_parameters(found, options),
            seconds=seconds,
        ),
        coverage=_coverage(found),
        layers=_layers(found, several=several),
        summary=Summary(
            model=first.model,
            nulls=first.nulls,
            modules=first.modules,
            module_nulls=first.module_nulls,
            verdict=_verdict(found, options),
            runs=tuple(sorted(runs, key=lambda run: run.tuned)) if several else (),
            lineage=_lineage(found),
        ),
        overlaps=_overlaps(found),
    )


# --- numbers --------------------------------------------------------------------------------------


def _numbers(rows: Sequence[Looked], i: int) -> Collected:
    """What some matrices together tell of one candidate."""
    kin, numbers = kin_of(rows), Collected()
    cosine, base = kin.cosine(i).value, float(kin.energies[:, i].sum()) ** 0.5
    numbers.put("base_cosine", None if math.isnan(cosine) else cosine)
    numbers.nulls["base_cosine"] = 0.0
    distance = kin.distance(i)
    numbers.put("relative_update", distance / base if base else None)
    changed = Status.OK if distance else Status.ZERO_UPDATE
    noise = float(kin.noise[:, 0].sum() + kin.coarser[1, :, i - 1].sum()) ** 0.5
    numbers.put("precision_ratio", noise / distance if distance else None, changed)
    numbers.put("growth", kin.growth(i, 0).value if distance else None, changed)
    numbers.nulls["growth"] = 1.0
    _put_unchanged(numbers, rows, i, kin)
    return numbers


def _put_unchanged(numbers: Collected, rows: Sequence[Looked], i: int, kin: Kin) -> None:
    """Shares of entries, weighted by their number; of matrices on grids none."""
    weights = kin.parameters.tolist()
    known = [
        (shares, weight)
        for row, weight in zip(rows, weights, strict=True)
        if (shares := row.unchanged[i - 1]) is not None
    ]
    total = math.fsum(weight for _, weight in known)
    if not total:
        numbers.put("update_sparsity", None)
        return
    value, null = (math.fsum(one[k] * weight for one, weight in known) / total for k in (0, 1))
    numbers.put("update_sparsity", value)
    numbers.nulls["update_sparsity"] = null


def _of_candidate(found: Found, i: int) -> Collected:
    """The numbers of a candidate over all matrices, with its place in the family."""
    numbers, family = _numbers(found.rows, i), found.family
    angle = family.angles.get(i)
    if angle is not None:
        numbers.put("lineage_angle", math.acos(max(-1.0, min(1.0, angle.value))))
        numbers.nulls["lineage_angle"] = math.pi / 2
    equal = found.embeddings[i - 1].values()
    numbers.put("equal_embeddings", sum(equal) / len(equal) if equal else None)
    if (copy := family.copies.get(i)) is not None:
        numbers.put("copy_share", copy.share)
    if family.merge is not None and i in family.merge.weights:
        numbers.put("merge_weight", family.merge.weights[i])
    return numbers


def _run(found: Found, i: int, options: LineageOptions) -> Run:
    numbers = _of_candidate(found, i)
    modules: dict[str, list[Looked]] = {}
    for row in found.rows:
        modules.setdefault(module_kind(row.name), []).append(row)
    parts = {module: _numbers(rows, i) for module, rows in modules.items()}
    return Run(
        tuned=found.number(i),
        model=numbers.values,
        nulls=numbers.nulls,
        modules={module: part.values for module, part in parts.items()},
        module_nulls={module: part.nulls for module, part in parts.items()},
        verdict=_role(found.family.roles[i], options),
    )


def _role(code: str, options: LineageOptions, text: str = "") -> Verdict:
    return Verdict(code, None, {}, (), {}, text, _limits(options))


def _aside(number: int, reason: str) -> Run:
    return Run(number, {}, {}, {}, {}, Verdict(_OTHER, None, {}, (), {}, reason, {}))


def _layers(found: Found, *, several: bool) -> Layers:
    return Layers(
        _record(row, i, found.number(i) if several else None)
        for i in range(1, len(found.relatives.candidates) + 1)
        for row in found.rows
    )


def _record(row: Looked, i: int, tuned: int | None) -> LayerRecord:
    numbers = _numbers([row], i)
    grids = {"model": row.grids[0], "candidate": row.grids[i]}
    return LayerRecord(
        name=row.name,
        layer=layer_index(row.name),
        module=module_kind(row.name),
        shape=row.pairs[0].shape,
        values=numbers.values,
        nulls=numbers.nulls,
        status=numbers.status,
        notes=tuple(f"the {side} lies on an {grid}" for side, grid in grids.items() if grid),
        tuned=tuned,
    )


def _overlaps(found: Found) -> tuple[Overlap, ...]:
    """Angles of the triangles of model and two candidates, matrix by matrix."""
    pairs = [*combinations(range(1, len(found.relatives.candidates) + 1), 2)]
    made: list[Overlap] = []
    for row in found.rows:
        kin = kin_of([row])
        for a, b in pairs:
            at = {"model": (0, a, b), "first": (a, 0, b), "second": (b, 0, a)}
            values = {f"angle_at_{name}": _angle(kin, *three) for name, three in at.items()}
            nulls = dict.fromkeys(values, math.pi / 2)
            made.append(Overlap(row.name, found.number(a), found.number(b), values, nulls))
    return tuple(made)


def _angle(kin: Kin, at: int, a: int, b: int) -> float | None:
    cosine = kin.vertex(at, a, b).value
    return None if math.isnan(cosine) else math.acos(max(-1.0, min(1.0, cosine)))


# --- the answer -----------------------------------------------------------------------------------


def _limits(options: LineageOptions) -> dict[str, float]:
    own = ("lineage.", "unrelated.", "too_far.", "words.quantised", "undetermined.")
    return {k: v for k, v in limits_in_force(options.limits).items() if k.startswith(own)}


def _verdict(found: Found, options: LineageOptions) -> Verdict:
    family, kin = found.family, found.kin
    names = {i: found.refs[found.number(i)].tail for i in kin.candidates}
    grids = {i: found.refs[found.number(i)].storage_dtype for i in (0, *kin.candidates)}
    grids |= {i: grid for row in found.rows for i, grid in enumerate(row.grids) if grid}
    text = told(family, kin, names, grids, len(found.rows))
    if found.relatives.others:
        aside = first_names([found.refs[number].tail for number in found.relatives.others])
        text += f". Of other shapes: {aside}"
    return Verdict(
        code=family.code,
        share=None,
        shares={},
        flagged=(),
        counts={},
        text=text,
        thresholds=_limits(options),
        explain=family.explain,
    )


def _lineage(found: Found) -> dict[str, object]:
    """The tree by the numbers of `refs`; null for the root and for what is not in it."""
    family, count = found.family, len(found.refs)
    parents: list[int | None] = [None] * count
    beside: list[int | None] = [None] * count
    for i, node in family.tree.items():
        parents[found.number(i)] = None if node.parent is None else found.number(node.parent)
        beside[found.number(i)] = None if node.beside is None else found.number(node.beside)
    weights = {} if family.merge is None else family.merge.weights
    return {
        "parents": parents,
        "beside": beside,
        "weights": {str(found.number(i)): weight for i, weight in weights.items()},
        "clear": family.is_clear or not _unread(found),
    }


def _unread(found: Found) -> tuple[str, ...]:
    done = {row.name for row in found.rows}
    return tuple(n for n in found.relatives.names if n not in done and n not in found.failed)


def _coverage(found: Found) -> Coverage:
    """What any of the candidates lacks is missing."""
    pairings = [one.pairing for one in found.relatives.candidates]
    skipped = {(one.name, one.reason): one for pairing in pairings for one in pairing.skipped}
    missing = [name for pairing in pairings for name in pairing.missing]
    failed = [Skipped(name, reason, missing=True) for name, reason in found.failed.items()]
    return Coverage(
        matched=tuple(row.name for row in found.rows),
        base_only=_union([pairing.base_only for pairing in pairings]),
        tuned_only=_union([pairing.tuned_only for pairing in pairings]),
        shape_mismatch=tuple(
            {one.name: one for pairing in pairings for one in pairing.shape_mismatch}.values()
        ),
        skipped=(*skipped.values(), *failed),
        renamed=tuple(dict.fromkeys(one for pairing in pairings for one in pairing.renamed)),
        missing=_union([missing, found.failed]),
        unread=_unread(found),
    )


def _union(parts: Sequence[Mapping[str, str] | Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


def _parameters(found: Found, options: LineageOptions) -> dict[str, object]:
    candidates = found.relatives.candidates
    notes = [note for one in candidates for note in (*one.own.notes, *one.notes)]
    asides = [
        f"{found.refs[number].given}: {reason}" for number, reason in found.relatives.others.items()
    ]
    return {
        "all_matrices": options.all_matrices,
        "include": list(options.include),
        "exclude": list(options.exclude),
        "layers": None if options.layers is None else sorted(options.layers),
        "map_name": list(options.map_name),
        "notes": list(dict.fromkeys([*found.relatives.model.notes, *notes, *asides])),
    }
