"""What the answer says of a model and its candidates, in a sentence or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from geoscope.digits import number
from geoscope.errors import first_names
from geoscope.metrics.family import Family
from geoscope.metrics.kin import Kin

__all__ = ["told"]

_BEHIND = ("ANCESTOR", "BEYOND")


def told(
    family: Family, kin: Kin, names: Mapping[int, str], grids: Mapping[int, str], count: int
) -> str:
    """names: of the candidates by their place in `kin`; grids: what each lies on, 0 the model."""
    sentences = [_SAID[family.code](family, kin, names, grids)]
    sentences += _others(family, kin, names)
    if not family.is_clear and family.parent is not None and family.code != "COPY":
        sentences.append(f"Not clear: numbers near their limits in all {count} matrices")
    return ". ".join(sentences)


def _copy(family: Family, _kin: Kin, names: Mapping[int, str], _grids: Mapping[int, str]) -> str:
    same = [names[i] for i, role in family.roles.items() if role == "COPY"]
    return f"all its matrices are those of {first_names(same)}"


def _quantised(
    family: Family, _kin: Kin, names: Mapping[int, str], grids: Mapping[int, str]
) -> str:
    assert family.parent is not None
    name, copy = names[family.parent], family.copies[family.parent]
    on = grids[family.parent if copy.of_model else 0]
    what = f"{name} is the model, rounded" if copy.of_model else f"it is {name}, rounded"
    return f"{what} ({on}); rounding alone is {number(copy.share)} of what is between them"


def _merge(family: Family, _kin: Kin, names: Mapping[int, str], _grids: Mapping[int, str]) -> str:
    merge = family.merge
    assert merge is not None
    parts = [f"{number(weight)}·{names[i]}" for i, weight in merge.weights.items()]
    text = " + ".join(parts).replace("+ -", "− ")
    spread = f" ± {number(merge.spread)}" if merge.spread > 0.01 else ""
    return f"it is {text}{spread}, to {number(merge.noise)} of what rounding leaves"


def _descends(family: Family, kin: Kin, names: Mapping[int, str], _grids: Mapping[int, str]) -> str:
    assert family.parent is not None
    i = family.parent
    size = kin.distance(i) / float(kin.energies[:, i].sum()) ** 0.5
    text = f"it is {names[i]}, changed by {number(100 * size)} %"
    if len(kin.candidates) == 1:
        return f"{text}, or a near relative's"
    return text


def _line(family: Family, kin: Kin, names: Mapping[int, str], grids: Mapping[int, str]) -> str:
    text = _descends(family, kin, names, grids)
    return f"{text}, in the direction from what is behind; a sibling trained alike would be so, too"


def _between(family: Family, _kin: Kin, names: Mapping[int, str], _grids: Mapping[int, str]) -> str:
    return (
        f"it lies between {first_names(_near(family, names))}; norms do not tell which is the older"
    )


def _no_parent(
    family: Family, _kin: Kin, names: Mapping[int, str], _grids: Mapping[int, str]
) -> str:
    return f"it and {first_names(_near(family, names))} meet in a model that is not given"


def _either(family: Family, _kin: Kin, names: Mapping[int, str], _grids: Mapping[int, str]) -> str:
    return (
        f"related to {first_names(_near(family, names))}, whose norm is the larger: perhaps made "
        "from the model, or weights decayed"
    )


def _near(family: Family, names: Mapping[int, str]) -> Sequence[str]:
    return [names[i] for i, role in family.roles.items() if role in ("NEAR", "DESCENDANT")]


def _unrelated(
    family: Family, kin: Kin, _names: Mapping[int, str], _grids: Mapping[int, str]
) -> str:
    cosines = [kin.cosine(i) for i in kin.candidates]
    largest = max(cosines, key=lambda one: abs(one.value))
    known = f"cosine {number(largest.value)}, of unrelated weights 0 ± {largest.error:.1g}"
    if family.code == "UNRELATED":
        return f"it has nothing of any of them ({known})"
    return f"it is too far from each of them ({known})"


_SAID = {
    "COPY": _copy,
    "QUANTISED": _quantised,
    "MERGE": _merge,
    "DESCENDS": _descends,
    "LINE": _line,
    "BETWEEN": _between,
    "NO_PARENT": _no_parent,
    "EITHER_WAY": _either,
    "UNRELATED": _unrelated,
    "TOO_FAR": _unrelated,
}


def _others(family: Family, kin: Kin, names: Mapping[int, str]) -> list[str]:
    """What lies behind the parent, the nearest first, and what stems from it, too."""
    found: list[str] = []
    for roles, words in (
        (_BEHIND, "Behind it, nearest first: {}"),
        (("SIBLING",), "Beside the model: {}"),
        (("DESCENDANT",), "Made from the model: {}"),
    ):
        own = sorted((i for i, role in family.roles.items() if role in roles), key=kin.distance)
        if own and family.parent is not None:
            found.append(words.format(first_names([names[i] for i in own])))
    return found
