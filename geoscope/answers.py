"""What the first lines of a report answer: its outcomes in words, and the facts below them.

Tables for `geoscope.kinds`. An id that ends in `@k` stands for the k of most matrices. Sentences
may hold `{id}`, a number of the model, `{id:share}`, a share in percent, and `{id:noise}`, its null
as the row of the fact has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from geoscope.thresholds import LOSSY

__all__ = [
    "ALIGNMENT",
    "ANISOTROPY",
    "CAPACITY_USED",
    "COMPARED",
    "INITIALISED",
    "LINEAGE",
    "MOVED",
    "SPECTRUM",
    "Answer",
    "Condition",
    "Fact",
    "Outcome",
]


@dataclass(frozen=True)
class Condition:
    """A comparison of one number of the model; of a number that is missing it holds nothing.

    id: of the number.
    sign: `<`, `≥`, or `–` for a number that is missing.
    limit: the name of a threshold (`thresholds.py`), or a limit that is fixed.
    by_noise: the number is taken over its null.
    """

    id: str
    sign: str
    limit: str | float = 0.0
    by_noise: bool = False


@dataclass(frozen=True)
class Outcome:
    """One answer to the question of a kind; the first that fits is given.

    codes: of the verdict or of the distance from the base; none for every code and for no verdict.
    first: the first words.
    sentence: the rest; `{verdict}` is the verdict's own sentence.
    tone: good, open or bad; gives the colour.
    todo: what the user has to do.
    when: what must hold, too.
    about: ids of the facts that stand below it; all but those aside where it names none.
    """

    codes: tuple[str, ...]
    first: str
    sentence: str
    tone: str = "good"
    todo: str = ""
    when: tuple[Condition, ...] = ()
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """One row below the headline: a number of the model in words.

    label: what it is called here.
    words: what it is.
    id: of the number.
    unit: share (in percent), angle, or nothing.
    limit: the name of the threshold, or the id of the number, that stands on the row.
    sign: on which side of the limit the number is beyond it.
    beyond: the word for that.
    over_null: the name of a threshold times the null, where that is the larger limit.
    from_steps: the name of the least number of checkpoints at which the limit is in force.
    other: an id, of which the larger number is shown with its null.
    by_noise: the scale is of the number over its null.
    scale: up to which number, or threshold by its name, each word reads.
    rest: the word beyond the scale; `{times}` is the number over its null.
    is_aside: it stands only where the outcome is about it.
    has_own_null: whether its null differs between models; else words tell it.
    """

    label: str
    words: str
    id: str
    unit: str = ""
    limit: str = ""
    sign: str = "≥"
    beyond: str = ""
    over_null: str = ""
    from_steps: str = ""
    other: str = ""
    by_noise: bool = False
    scale: tuple[tuple[float | str, str], ...] = ()
    rest: str = ""
    is_aside: bool = False
    has_own_null: bool = True


@dataclass(frozen=True)
class Answer:
    """How a kind answers.

    outcomes: the first that fits is the headline.
    facts: rows, most important first.
    noise: the head of the column of nulls, and what it is.
    caveat: what the answer cannot see.
    next: the command to try next, with the question it answers.
    by_block: whether a row says where in the model the update is.
    is_joint: several models have one answer together, and a row each below it.
    arrow: between the first model and the others, in the title.
    others: what these are.
    tells_merging: whether a sentence says how several updates would merge.
    roles: code → word of each of several models in the table of a joint answer.
    """

    outcomes: tuple[Outcome, ...]
    facts: tuple[Fact, ...]
    noise: tuple[str, str] = ("noise", "a random update of this size")
    caveat: str = "This is about weights: reward, entropy and accuracy are not in them."
    next: str = ""
    by_block: bool = False
    is_joint: bool = False
    arrow: str = "→"
    others: str = "tuned models"
    tells_merging: bool = False
    roles: tuple[tuple[str, str], ...] = ()


_OTHER_BASE = "Give as BASE the model that the tuned one was trained from."
_OF_FAR = ("base_cosine", "relative_update")
_FAR = (
    Outcome(
        ("UNRELATED",),
        "UNRELATED MODELS",
        "the tuned model has nothing of this base (cosine {base_cosine}).",
        "bad",
        _OTHER_BASE,
        about=_OF_FAR,
    ),
    Outcome(
        ("TOO_FAR",),
        "CANNOT TELL",
        "the tuned model is too far from this base (cosine {base_cosine}).",
        "bad",
        _OTHER_BASE,
        about=_OF_FAR,
    ),
)
_UNCHANGED = Outcome(
    ("NO_UPDATE",),
    "NO CHANGE",
    "no weight in scope changed.",
    "open",
    about=("relative_update",),
)
_UNRESOLVED = Outcome(
    ("UNDETERMINED",),
    "CANNOT TELL",
    "{verdict}",
    "open",
    about=("precision_ratio", "step_precision_ratio", "relative_update"),
)
_LOST = "the spectrum lost rank; the effective rank is {rank_ratio} of the base's."
_RANK_IS_LOST = (Condition("rank_ratio", "<", "distorted.rank_ratio"),)

# What comes before any word about directions, where a verdict judges an update.
_UPDATE = (
    *_FAR,
    _UNCHANGED,
    Outcome(
        ("INIT_MISMATCH",),
        "START COUNTED TWICE",
        "both the base and the update hold the start of the adapter.",
        "bad",
        "Run it again with `initial_adapter`: the adapter as it was before training.",
        about=("relative_update", "spectral_share", "versus_base@k"),
    ),
    _UNRESOLVED,
    Outcome(
        ("RANK_COLLAPSE",),
        "COLLAPSE",
        "one direction holds {update.top_share@1:share} of the update.",
        "bad",
    ),
    Outcome((), "COLLAPSE", _LOST, "bad", when=_RANK_IS_LOST),
    Outcome(
        ("SPECTRUM_DISTORTED",),
        "DISTORTED",
        "an update of {relative_update:share} of the weights moved values or directions "
        "beyond their limits.",
        "bad",
    ),
    Outcome(
        (),
        "CANNOT TELL",
        "the effective rank has no number (`quick` takes none).",
        "open",
        when=(Condition("rank_ratio", "–"),),
    ),
)
_KEPT = "the spectrum kept its rank"
_ON = "energy_two_sided@k"
_LEADING = "of the update is on the base's leading directions (noise {energy_two_sided@k:noise})."

# Rows that several kinds share.
_RESOLVED_SCALE = ((0.1, "ok"), ("undetermined.precision_ratio", "visible"))
_RESOLVED = Fact(
    "resolved",
    "rounding over update (ν)",
    "precision_ratio",
    limit="undetermined.precision_ratio",
    beyond="hidden",
    scale=_RESOLVED_SCALE,
    rest="hidden",
)
_SIZE = Fact("size", "of the weights (ρ)", "relative_update", "share")
_COSINE = Fact(
    "cosine",
    "of base and tuned",
    "base_cosine",
    limit="too_far.cosine",
    sign="<",
    beyond="too far",
    is_aside=True,
)
_FEW = (("words.few_directions", "few"), ("words.many_directions", "like noise"))
_DIRECTIONS = Fact(
    "directions",
    "the update uses",
    "update.stable_rank",
    by_noise=True,
    scale=_FEW,
    rest="many",
)
_LARGEST = Fact(
    "largest direction",
    "share of the update",
    "update.top_share@1",
    "share",
    limit="rank_collapse.top_share",
    beyond="alone",
)
_TIMES = (("words.avoids", "avoided"), ("words.enriched", "like noise"))
_TURNED_TIMES = (("distorted.angle_over_null", "like noise"),)
_ON_PRINCIPALS = Fact(
    "along the base",
    "energy in its top {k} × {k}",
    _ON,
    "share",
    limit="on_principal.energy_two_sided",
    beyond="on them",
    by_noise=True,
    scale=_TIMES,
    rest="{times} noise",
)
_TURNED = Fact(
    "turned",
    "base's top {k}, mean angle",
    "angle_left_mean@k",
    "angle",
    limit="distorted.angle",
    beyond="turned",
    over_null="distorted.angle_over_null",
    other="angle_right_mean@k",
)
_SPECTRUM_FACTS = (
    _COSINE,
    Fact(
        "values moved",
        "of the update (NSS/ρ)",
        "spectral_share",
        "share",
        limit="init_mismatch.spectral_share",
        beyond="all of it",
        is_aside=True,
    ),
    Fact(
        "like the base",
        "of the base's own share",
        "versus_base@k",
        limit="init_mismatch.versus_base",
        beyond="more",
        is_aside=True,
    ),
    Fact(
        "rank kept",
        "effective rank, tuned/base",
        "rank_ratio",
        limit="distorted.rank_ratio",
        sign="<",
        beyond="lost",
    ),
    Fact(
        "values moved",
        "change of the values (NSS)",
        "nss",
        "share",
        limit="distorted.nss",
        beyond="distorted",
    ),
    _TURNED,
    _LARGEST,
    Fact("new directions", "intruders", "intruders", scale=((0.5, "none"),), rest="some"),
    _DIRECTIONS,
    _ON_PRINCIPALS,
    _RESOLVED,
    _SIZE,
)

SPECTRUM = Answer(
    outcomes=(
        *_UPDATE,
        Outcome(("ON_PRINCIPAL",), "NO COLLAPSE", f"{_KEPT}; {{{_ON}:share}} {_LEADING}", "open"),
        Outcome((), "NO COLLAPSE", f"{_KEPT}."),
    ),
    facts=_SPECTRUM_FACTS,
    caveat="This is about weights: it cannot see reward or entropy collapse.",
    next="which rank: geoscope capacity",
    by_block=True,
)
COMPARED = Answer(
    outcomes=(
        *_UPDATE,
        Outcome(("ON_PRINCIPAL",), "NO COLLAPSE, ON PRINCIPAL", f"{{{_ON}:share}} {_LEADING}"),
        Outcome(("OFF_PRINCIPAL",), "NO COLLAPSE, OFF PRINCIPAL", f"{{{_ON}:share}} {_LEADING}"),
        Outcome((), "NO COLLAPSE, MIXED", f"{{{_ON}:share}} {_LEADING}"),
    ),
    facts=_SPECTRUM_FACTS,
    next="which rank: geoscope capacity",
    by_block=True,
)


def _unresolved(key: str) -> Outcome:
    """Where no matrix has a number for the id."""
    words = "no matrix has a resolved update."
    return Outcome((), "CANNOT TELL", words, "open", "", (Condition(key, "–"),))


ALIGNMENT = Answer(
    tells_merging=True,
    outcomes=(
        *_FAR,
        _unresolved(_ON),
        Outcome(
            (),
            "ON PRINCIPAL",
            f"{{{_ON}:share}} {_LEADING}",
            "open",
            "",
            (Condition(_ON, "≥", "on_principal.energy_two_sided"),),
        ),
        Outcome(
            (),
            "OFF PRINCIPAL",
            f"{{{_ON}:share}} {_LEADING}",
            when=(
                Condition(_ON, "<", "off_principal.energy_two_sided"),
                Condition("versus_base@k", "<", "off_principal.versus_base"),
            ),
        ),
        Outcome(
            (),
            "LIKE NOISE",
            f"{{{_ON}:share}} {_LEADING}",
            "open",
            when=(Condition(_ON, "<", "words.enriched", by_noise=True),),
        ),
        Outcome((), "PARTLY ON PRINCIPAL", f"{{{_ON}:share}} {_LEADING}"),
    ),
    facts=(
        _COSINE,
        _ON_PRINCIPALS,
        Fact("like the base", "of the base's own share there", "versus_base@k", "share"),
        Fact(
            "on one side",
            "base's top {k}, inputs (right)",
            "energy_right@k",
            "share",
            by_noise=True,
            scale=_TIMES,
            rest="{times} noise",
        ),
        Fact(
            "",
            "base's top {k}, outputs (left)",
            "energy_left@k",
            "share",
            by_noise=True,
            scale=_TIMES,
            rest="{times} noise",
        ),
        Fact(
            "turned",
            "base's top {k}, outputs (left)",
            "angle_left_mean@k",
            "angle",
            by_noise=True,
            scale=_TURNED_TIMES,
            rest="{times} noise",
        ),
        Fact(
            "",
            "base's top {k}, inputs (right)",
            "angle_right_mean@k",
            "angle",
            by_noise=True,
            scale=_TURNED_TIMES,
            rest="{times} noise",
        ),
        Fact("unchanged", "entries equal in the files", "update_sparsity", "share"),
        _RESOLVED,
        _SIZE,
    ),
    next="did it collapse: geoscope collapse",
)
ANISOTROPY = Answer(
    outcomes=(
        *_FAR,
        _unresolved("update.stable_rank"),
        Outcome(
            (),
            "FEW DIRECTIONS",
            "the update uses {update.stable_rank}, noise of its size {update.stable_rank:noise}.",
            when=(Condition("update.stable_rank", "<", "words.few_directions", by_noise=True),),
        ),
        Outcome(
            (),
            "LIKE NOISE",
            "the update uses {update.stable_rank} directions, noise of its size "
            "{update.stable_rank:noise}.",
            "open",
        ),
    ),
    facts=(
        _COSINE,
        _DIRECTIONS,
        Fact(
            "by energy",
            "directions (entropy rank)",
            "update.entropy_rank",
            by_noise=True,
            scale=_FEW,
            rest="many",
        ),
        Fact("hold 90 %", "directions needed (k90)", "update.k90", by_noise=True, scale=_FEW),
        _LARGEST,
        Fact("largest 8", "share of the update", "update.top_share@8", "share"),
        Fact("above noise", "directions (signal rank)", "update.signal_rank"),
        _RESOLVED,
        _SIZE,
    ),
    next="which rank: geoscope capacity",
    by_block=True,
)
_HOLDS = "rank {suggested_rank} holds 90 % of the energy above the noise in every matrix."
CAPACITY_USED = Answer(
    outcomes=(
        *_FAR,
        _UNCHANGED,
        _UNRESOLVED,
        Outcome(
            (),
            "CANNOT TELL",
            "no direction of the update is above its noise; no rank can be suggested.",
            "open",
            when=(Condition("suggested_rank", "–"),),
        ),
        Outcome(
            ("SATURATED",),
            "RANK USED UP",
            "a larger rank may have been used.",
            "bad",
            "If it did not start at zero, give its start with `initial_adapter`.",
        ),
        Outcome(("RANK_COLLAPSE",), "FAR TOO LARGE", _HOLDS, "bad"),
        Outcome(("CONCENTRATED", "IDLE"), "LARGER THAN NEEDED", _HOLDS, "open"),
        Outcome(("USED",), "THE RANK FITS", _HOLDS),
        Outcome(("FULL_UPDATE",), "A FULL UPDATE", _HOLDS),
        Outcome((), "NO SINGLE PATTERN", _HOLDS, "open"),
    ),
    facts=(
        _COSINE,
        Fact("rank needed", "for 90 % of the energy", "suggested_rank"),
        Fact("rank given", "in the adapter's config", "nominal_rank"),
        Fact(
            "flatness",
            "effective rank/rank given",
            "effective_rank_share",
            "share",
            limit="capacity.concentrated",
            sign="<",
            beyond="a few",
        ),
        Fact(
            "hold 90 %",
            "share of the rank needed",
            "k90_share",
            "share",
            limit="capacity.saturated_k90",
            beyond="full",
        ),
        Fact("hold 99 %", "share of the rank needed", "k99_share", "share"),
        Fact(
            "last direction",
            "strength over the first's",
            "tail_ratio",
            "share",
            limit="capacity.saturated_tail",
            beyond="strong",
        ),
        _RESOLVED,
        _SIZE,
    ),
    noise=("flat", "an update that uses its whole rank evenly"),
    caveat="This is about energy: what a rank does for the task is not in the weights.",
)
MOVED = Answer(
    outcomes=(
        *_FAR,
        _UNCHANGED,
        _UNRESOLVED,
        Outcome(
            ("DRIFT",),
            "STEADY DRIFT",
            "the run keeps its direction; it can be predicted {horizon} steps ahead.",
            when=(Condition("horizon", "≥", 1.0),),
        ),
        Outcome(
            ("DRIFT",),
            "STEADY DRIFT",
            "the run keeps its direction; no method predicts it credibly.",
        ),
        Outcome(
            (),
            "NO STEADY DRIFT",
            "the steps change direction as in a random walk, or more.",
            "open",
        ),
    ),
    facts=(
        _COSINE,
        Fact(
            "common drift",
            "share of a step's energy",
            "drift_fraction_corrected",
            "share",
        ),
        Fact(
            "by chance",
            "a walk shows as much (p)",
            "drift_p",
            limit="level",
            from_steps="few",
            beyond="perhaps",
            scale=(("level", "hardly"),),
            rest="perhaps",
        ),
        Fact("neighbours", "cosine of two steps", "increment_cosine_corrected"),
        Fact("straightness", "distance/length of path", "straightness"),
        Fact("on a line", "R² of a line in the step", "linear_r2", is_aside=True),
        Fact("largest direction", "share of the last update", "rank1_share_last", "share"),
        Fact(
            "rewritten",
            "stored entries, a step",
            "changed_share",
            "share",
            limit="sync_break_even",
            beyond="no gain",
        ),
        Fact(
            "predicted",
            "error cut, to standing still",
            "skill@damped(linear)",
            "share",
            scale=((0.0, "no better"),),
            rest="better",
        ),
        Fact("horizon", "steps ahead, credible", "horizon", scale=((0.5, "none"),)),
        Fact(
            "resolved",
            "rounding over a step (ν)",
            "step_precision_ratio",
            scale=_RESOLVED_SCALE,
            rest="hidden",
        ),
        _SIZE,
    ),
    noise=("walk", "a random walk with steps of the same size"),
    next="predict: geoscope extrapolate",
)
_NOTHING = 1e-30  # below it a relative norm is that of a zero product
INITIALISED = Answer(
    outcomes=(
        Outcome(
            (),
            "READY",
            "the adapter starts at zero: the model is as it was.",
            when=(Condition("relative_norm", "<", _NOTHING),),
        ),
        Outcome(
            (),
            "START IS OFF",
            "the written start differs from the model by {reconstruction_error:share}.",
            "open",
            when=(Condition("reconstruction_error", "≥", LOSSY),),
        ),
        Outcome(
            (),
            "READY",
            "the start equals the model, to {reconstruction_error} as the files are written.",
            when=(Condition("reconstruction_error", "<", LOSSY),),
        ),
        Outcome((), "CANNOT TELL", "the start error has no number.", "open"),
    ),
    facts=(
        Fact("size of start", "product over the weights", "relative_norm", "share"),
        Fact("captured", "energy in this rank", "captured_energy", "share"),
        Fact("along the base", "of the start, leading r", "head_energy", "share"),
        Fact("masked", "entries that may change", "density_union", "share"),
        Fact("masks agree", "overlap of both (Jaccard)", "jaccard", "share"),
        Fact("", "energy of these entries", "masked_energy", "share"),
        Fact("gap", "at r, the smallest", "gap"),
        Fact("start error", "the largest, relative", "reconstruction_error"),
    ),
    noise=("chance", "random matrices, masks and directions"),
    caveat="Facts of the start alone: how training goes is not in them.",
    next="is it sound: geoscope verify-adapter",
)
_WAY = "Check which is the older one: a date, a model card, a tokenizer that grew."
_MORE = "Give more candidates; none of these is the one."
LINEAGE = Answer(
    outcomes=(
        Outcome(("COPY",), "THE SAME WEIGHTS", "{verdict}"),
        Outcome(("QUANTISED",), "A ROUNDED COPY", "{verdict}"),
        Outcome(("MERGE",), "A MERGE", "{verdict}"),
        Outcome(("DESCENDS",), "PARENT FOUND", "{verdict}"),
        Outcome(("LINE",), "PARENT LIKELY", "{verdict}", "open"),
        Outcome(("BETWEEN",), "BETWEEN TWO", "{verdict}", "open", _WAY),
        Outcome(("NO_PARENT",), "NO PARENT, BUT FAMILY", "{verdict}", "open", _MORE),
        Outcome(("EITHER_WAY",), "FAMILY, WHICH WAY?", "{verdict}", "open", _WAY),
        Outcome(("UNRELATED",), "NOT MADE FROM THESE", "{verdict}", "bad", _MORE),
        Outcome(("TOO_FAR",), "CANNOT TELL", "{verdict}", "bad", _MORE),
        Outcome((), "CANNOT TELL", "{verdict}", "bad"),
    ),
    roles=(
        ("PARENT", "parent"),
        ("ANCESTOR", "ancestor"),
        ("BEYOND", "behind it"),
        ("SIBLING", "sibling"),
        ("DESCENDANT", "descendant"),
        ("NEAR", "near"),
        ("RELATIVE", "relative"),
        ("COPY", "the same"),
        ("QUANTISED", "rounded"),
        ("MERGED", "merged"),
        ("UNRELATED", "unrelated"),
        ("TOO_FAR", "too far"),
        ("OTHER_SHAPES", "other shapes"),
    ),
    facts=(
        Fact(
            "cosine",
            "of both weights",
            "base_cosine",
            limit="too_far.cosine",
            sign="<",
            beyond="too far",
            has_own_null=False,
        ),
        Fact("size", "of the update (ρ)", "relative_update", "share"),
        Fact("angle", "at it; 90°: between", "lineage_angle", "angle", has_own_null=False),
        Fact("unchanged", "entries equal in bf16", "update_sparsity", "share"),
        Fact("vocab.", "embedding, head equal", "equal_embeddings", "share"),
        Fact("growth", "of ‖W‖² over ‖ΔW‖²", "growth"),
        Fact("in the merge", "its weight", "merge_weight"),
        Fact("rounded", "rounding/distance", "copy_share", "share"),
        _RESOLVED,
    ),
    noise=("noise", "unrelated updates (at 90°)"),
    caveat="Which of two is older is told by norms alone: weight decay can reverse it.",
    next="what changed: geoscope compare",
    is_joint=True,
    arrow="←",
    others="candidates",
)
