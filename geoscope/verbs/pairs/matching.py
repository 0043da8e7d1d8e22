"""Which tensors of two models correspond, in the parts that are compared, and what is left out?"""

from __future__ import annotations

from dataclasses import replace

from geoscope.errors import PairingError, first_names
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import common_rows, is_resized, pair
from geoscope.models.scope import Scope
from geoscope.models.split import common_config
from geoscope.names import NameMap
from geoscope.records import Pairing, Skipped
from geoscope.verbs.models import split_tuned, split_with_notes
from geoscope.verbs.options import Options

__all__ = ["match_models"]


def match_models(
    base: Checkpoint, tuned: Checkpoint, options: Options
) -> tuple[Checkpoint, Checkpoint, Pairing, tuple[str, ...]]:
    """Both sides in the parts that are compared, their correspondence, and remarks on it."""
    config = common_config(base, tuned)
    # What both were taken apart into is said once, of the pair.
    whole, base, told = base, *split_with_notes(base, config)
    tuned, base, more = split_tuned(tuned, whole, base, config)
    told += more
    names = NameMap(options.map_name)
    notes = tuple(dict.fromkeys(told))
    notes += names.notes([*base.tensors, *tuned.tensors, *base.module_names, *tuned.module_names])
    if options.allow_vocab_resize:
        base, tuned, resized = _common_rows(base, tuned, names)
        notes += resized
    if tuned.lies_over(base):
        # what the adapter changes is compared, though the base has it as a copy
        pairing = pair(replace(base, tied_to=tuned.tied_to), tuned, options.selection, names)
        pairing = _adapted_only(pairing, tuned, options)
    else:
        pairing = pair(base, tuned, options.selection, names)
    notes += tuple(
        f"{one.name}: {one.base[0]} rows in base, {one.tuned[0]} in tuned; `allow_vocab_resize` "
        "compares the rows that both have"
        for one in pairing.shape_mismatch
        if one.name in pairing.missing and is_resized(one.name, one.base, one.tuned)
    )
    return base, tuned, pairing, notes


def _common_rows(
    base: Checkpoint, tuned: Checkpoint, names: NameMap
) -> tuple[Checkpoint, Checkpoint, tuple[str, ...]]:
    """As `common_rows`, of an adapter over the base, too."""
    before, (base, narrow, notes) = base, common_rows(base, tuned, names)
    cut = {name: view.blocks for name, view in narrow.views.items() if name not in tuned.views}
    return base, narrow.over_rows(before, base, cut), notes


def _adapted_only(pairing: Pairing, tuned: Checkpoint, options: Options) -> Pairing:
    """Without what the adapter leaves as it is. Raises PairingError where nothing is left."""
    left_out = [
        Skipped(matrix.name, "the adapter leaves it as it is")
        for matrix in (*pairing.matrices, *pairing.vectors)
        if tuned.leaves(matrix.tuned.name)
    ]
    names = {one.name for one in left_out}
    matrices = tuple(matrix for matrix in pairing.matrices if matrix.name not in names)
    vectors = tuple(vector for vector in pairing.vectors if vector.name not in names)
    lacking = _lacking(tuned, options)
    missing = (*pairing.missing, *(one.name for one in lacking if one.missing))
    if not matrices and not (options.include and vectors):
        changed = first_names([name for name in tuned.tensors if not tuned.leaves(name)]) or "none"
        raise PairingError(
            f"{tuned.ref.given}: changes no matrix in scope; it changes {changed}; see `include`"
        )
    return replace(
        pairing,
        matrices=matrices,
        vectors=vectors,
        skipped=(*pairing.skipped, *left_out, *lacking),
        renamed=(*pairing.renamed, *tuned.renamed),
        missing=missing,
    )


def _lacking(tuned: Checkpoint, options: Options) -> tuple[Skipped, ...]:
    """What the adapter brings and the base has no tensor of; missing where it is in scope."""
    scope = Scope.of(options.selection, tuned.tensors.values())
    return tuple(
        Skipped(info.name, reason, missing=scope.wants_matrix(info))
        for info, reason in tuned.uncompared
    )
