"""KINDS: everything that is particular to one kind of report, in one frozen table.

What it holds (families of METRICS, overlaps, curves), who judges it and with which codes, and what
it shows: ids of its tables, most important first (what does not fit a narrow terminal is left out
from the right), panels of its figure, its words. An id that ends in `@k` stands for every k in the
report. What else a new kind needs: docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from geoscope.answers import (
    ALIGNMENT,
    ANISOTROPY,
    CAPACITY_USED,
    COMPARED,
    INITIALISED,
    LINEAGE,
    MOVED,
    SPECTRUM,
    Answer,
)

__all__ = ["CAPACITY", "FAR", "KIN", "KINDS", "MOTION", "PAIR_KINDS", "UPDATE", "Judge", "Kind"]


@dataclass(frozen=True)
class Judge:
    """Whose rules give the verdict.

    name: of the rules.
    codes: what they can say, in order of precedence.
    blind_start: the code of an adapter whose update holds a start that is not known.
    """

    name: str
    codes: tuple[str, ...]
    blind_start: str = "UNDETERMINED"


# How far a model is from the base, before any rule of a kind.
FAR = ("UNRELATED", "TOO_FAR")
UPDATE = Judge(
    "update",
    (
        *FAR,
        "NO_UPDATE",
        "INIT_MISMATCH",
        "UNDETERMINED",
        "RANK_COLLAPSE",
        "ON_PRINCIPAL",
        "SPECTRUM_DISTORTED",
        "OFF_PRINCIPAL",
        "MIXED",
    ),
    blind_start="INIT_MISMATCH",
)
CAPACITY = Judge(
    "capacity",
    (
        *FAR,
        "NO_UPDATE",
        "UNDETERMINED",
        "SATURATED",
        "RANK_COLLAPSE",
        "CONCENTRATED",
        "IDLE",
        "USED",
        "FULL_UPDATE",
    ),
)
MOTION = Judge("motion", (*FAR, "NO_UPDATE", "UNDETERMINED", "DRIFT", "NO_DRIFT"))
# Of the model, and of each candidate.
KIN = Judge(
    "kin",
    (
        *FAR,
        *("COPY", "QUANTISED", "MERGE", "DESCENDS", "LINE", "BETWEEN", "NO_PARENT"),
        "EITHER_WAY",
        *("PARENT", "ANCESTOR", "BEYOND", "SIBLING", "DESCENDANT", "NEAR", "RELATIVE", "MERGED"),
        "OTHER_SHAPES",
    ),
)


@dataclass(frozen=True)
class Kind:
    """One kind of report.

    families: of METRICS that it holds; none where it is not about a base and a tuned model.
    judge: who gives its verdict; None for no verdict.
    overlaps: whether several tuned models are compared with each other, too.
    curves: what is kept of each matrix for the figure.
    model: groups of ids of the model block.
    columns: ids of the tables.
    worst: the id that orders the matrices where no verdict flags any.
    sentence: the id and the words of the headline where there is no verdict.
    panels: rows of panels of the figure (geoscope.report.panels).
    close: panels of the page alone.
    answer: its first lines: headline and facts.
    null: what the nulls of this kind are, as the head of their column and in the legend.
    share: what a verdict's shares are of, in the headline and beside the counts of matrices.
    drops_empty: rows and columns in which no matrix has a number are left out.
    has_cautions: whether rounding may mark a number.
    """

    title: str
    model: tuple[tuple[str, tuple[str, ...]], ...]
    columns: tuple[str, ...]
    worst: str
    sentence: tuple[str, str]
    panels: tuple[tuple[str, ...], ...]
    answer: Answer
    families: tuple[str, ...] = ()
    judge: Judge | None = None
    overlaps: bool = False
    curves: tuple[str, ...] = ()
    null: tuple[str, str] = ("isotropic", "isotropic update of the same size")
    share: tuple[str, str] = ("of the update's energy", "matrices (share of energy)")
    close: tuple[str, ...] = ("worst",)
    drops_empty: bool = False
    has_cautions: bool = True

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes that its verdict can have; none without one."""
        return () if self.judge is None else self.judge.codes


_SIZE = (
    "size and storage",
    ("relative_update", "precision_ratio", "base_cosine", "update_sparsity"),
)
_SPECTRUM = (
    "spectrum of the update",
    (
        "update.stable_rank",
        "update.entropy_rank",
        "update.effective_rank",
        "update.participation_ratio",
        "update.top_share@1",
        "update.top_share@8",
        "update.k90",
        "update.k99",
        "update.signal_rank",
    ),
)
_SPECTRUM_BRIEF = (
    "spectrum of the update",
    ("update.stable_rank", "update.entropy_rank", "update.effective_rank", "update.top_share@1"),
)
_ALIGNMENT = (
    "alignment with the base",
    (
        "energy_two_sided@k",
        "energy_of_base@k",
        "versus_base@k",
        "energy_right@k",
        "energy_left@k",
        "outside_span",
        "auc_right",
        "auc_left",
        "angle_left_mean@k",
        "angle_right_mean@k",
        "gap@k",
    ),
)
_ALIGNMENT_BRIEF = (
    "alignment with the base",
    (
        "energy_two_sided@k",
        "energy_of_base@k",
        "versus_base@k",
        "angle_left_mean@k",
        "angle_right_mean@k",
    ),
)
_COLLAPSE = (
    "collapse of the spectrum",
    (
        "nss",
        "spectral_share",
        "rank_ratio",
        "stable_rank_ratio",
        "intruders",
        "intruder_energy",
        "intruders_right",
    ),
)
_MASKS = (
    "masks",
    ("mask_overlap_low", "mask_lift_low", "mask_overlap_principal", "mask_lift_principal"),
)
_ADAPTER = {
    "mask": (
        "density_union",
        "density_spec",
        "density_euc",
        "density_intersection",
        "jaccard",
        "masked_energy",
    ),
    "adapter": ("captured_energy", "gap", "head_energy", "relative_norm", "reconstruction_error"),
}

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "collapse": Kind(
            title="Spectral collapse",
            answer=SPECTRUM,
            families=("size", "collapse"),
            judge=UPDATE,
            curves=("energy",),
            model=(_SIZE, _COLLAPSE, _SPECTRUM_BRIEF, _ALIGNMENT_BRIEF),
            columns=(
                "relative_update",
                "spectral_share",
                "rank_ratio",
                "nss",
                "energy_two_sided@k",
                "update.stable_rank",
                "intruders",
                "angle_left_mean@k",
                "angle_right_mean@k",
            ),
            worst="spectral_lift",
            sentence=(
                "spectral_share",
                "{value} of the update's size changes singular values (NSS/ρ); "
                "of an isotropic update {null}.",
            ),
            panels=(("lift_map", "capture"),),
        ),
        "anisotropy": Kind(
            title="Anisotropy of the update",
            answer=ANISOTROPY,
            families=("size", "spectrum"),
            curves=("spectrum",),
            model=(_SIZE, _SPECTRUM),
            columns=(
                "relative_update",
                "precision_ratio",
                "update.stable_rank",
                "update.entropy_rank",
                "update.top_share@1",
                "update.effective_rank",
                "update.participation_ratio",
                "update.k90",
            ),
            worst="relative_update",
            sentence=(
                "update.stable_rank",
                "The update uses {value} directions (stable rank); "
                "an isotropic update of the same shape and size {null}.",
            ),
            panels=(("spectra_by_module",),),
        ),
        "alignment": Kind(
            title="Alignment with the base",
            answer=ALIGNMENT,
            families=("size", "update_alignment", "base_alignment", "masks"),
            overlaps=True,
            curves=("energy", "angles"),
            model=(_SIZE, _ALIGNMENT, _MASKS),
            columns=(
                "relative_update",
                "energy_two_sided@k",
                "angle_left_mean@k",
                "angle_right_mean@k",
                "versus_base@k",
                "energy_right@k",
                "energy_left@k",
                "gap@k",
            ),
            worst="lift@k",
            sentence=(
                "energy_two_sided@k",
                "{value} of the update's energy lies within the base's leading {k} directions on "
                "both sides; of an isotropic update {null}.",
            ),
            panels=(("angles_by_module",), ("capture", "angles")),
        ),
        "capacity": Kind(
            title="Capacity",
            answer=CAPACITY_USED,
            families=("size", "capacity"),
            judge=CAPACITY,
            curves=("spectrum",),
            model=(
                _SIZE,
                (
                    "rank",
                    (
                        "nominal_rank",
                        "effective_rank_share",
                        "entropy_rank_share",
                        "k90_share",
                        "k99_share",
                        "tail_ratio",
                        "suggested_rank",
                    ),
                ),
            ),
            columns=(
                "relative_update",
                "nominal_rank",
                "effective_rank_share",
                "k90_share",
                "k99_share",
                "tail_ratio",
                "suggested_rank",
            ),
            worst="suggested_rank",
            sentence=(
                "suggested_rank",
                "A rank of {value} holds 90 % of the energy above the noise in every matrix.",
            ),
            panels=(("spectra_by_module",),),
            null=(
                "flat",
                "a flat spectrum of rank r_max: r, or 2r where the start is part of the update",
            ),
            share=("of the changed matrices", "matrices"),
            drops_empty=True,
        ),
        "compare": Kind(
            title="Base and tuned compared",
            answer=COMPARED,
            families=(
                "size",
                "spectrum",
                "update_alignment",
                "base_alignment",
                "collapse",
                "masks",
            ),
            judge=UPDATE,
            overlaps=True,
            curves=("energy", "angles", "spectrum"),
            model=(_SIZE, _SPECTRUM_BRIEF, _ALIGNMENT_BRIEF, _COLLAPSE, _MASKS),
            columns=(
                "relative_update",
                "update.stable_rank",
                "energy_two_sided@k",
                "spectral_share",
                "angle_left_mean@k",
                "angle_right_mean@k",
                "rank_ratio",
                "nss",
                "precision_ratio",
            ),
            worst="relative_update",
            sentence=(
                "update.stable_rank",
                "The update uses {value} directions (stable rank); "
                "an isotropic update of the same shape and size {null}.",
            ),
            panels=(("lift_map", "capture"), ("spectra", "angles")),
        ),
        "init-adapter": Kind(
            title="Adapter initialised",
            answer=INITIALISED,
            model=tuple(_ADAPTER.items()),
            columns=(
                "relative_norm",
                "captured_energy",
                "head_energy",
                "reconstruction_error",
                "gap",
                "density_union",
                "masked_energy",
                "jaccard",
            ),
            worst="relative_norm",
            sentence=(
                "relative_norm",
                "The initial product s·B₀A₀ is {value} of the weights' norm, "
                "averaged over the matrices.",
            ),
            panels=(("adapter_energies", "adapter_masks"),),
            null=(
                "by chance",
                "by chance: a Gaussian matrix without a mask (captured energy, gap), independent "
                "masks, random directions (head energy)",
            ),
            drops_empty=True,
            has_cautions=False,
        ),
        "trajectory": Kind(
            title="Trajectory",
            answer=MOVED,
            judge=MOTION,
            model=(
                (
                    "size and storage",
                    ("relative_update", "path_length", "step_precision_ratio", "base_cosine"),
                ),
                (
                    "drift or diffusion",
                    (
                        "drift_fraction",
                        "drift_fraction_corrected",
                        "drift_p",
                        "increment_cosine",
                        "increment_cosine_corrected",
                        "straightness",
                        "curvature",
                    ),
                ),
                (
                    "temporal rank 1",
                    (
                        "temporal_pc1",
                        "temporal_pc1_centred",
                        "rank1_coefficient_r2",
                        "linear_r2",
                        "linear_r2_origin",
                    ),
                ),
                (
                    "between checkpoints",
                    (
                        "changed_share",
                        "sync_share",
                        "sync_share_gaps",
                        "sync_break_even",
                        "sync_bytes",
                    ),
                ),
                ("along the depth", ("depth_centre",)),
                (
                    "spectrum of the last update",
                    (
                        "update.stable_rank",
                        "update.effective_rank",
                        "effective_rank_share",
                        "update.top_share@1",
                        "spectral_share",
                        "rank_ratio",
                        "energy_two_sided@k",
                        "angle_left_mean@k",
                        "angle_right_mean@k",
                    ),
                ),
                ("single entries", ("scalar_r2_median", "scalar_r2_share", "scalar_r2_kept")),
                ("spatial rank 1", ("rank1_share_last", "norm_fraction")),
                (
                    "held-out skill",
                    (
                        "skill@two_point",
                        "skill@linear",
                        "skill@damped(linear)",
                        "skill@relex",
                        "skill@relex_pinned",
                        "skill@spatial_rank1_pinned",
                        "skill@auto",
                        "horizon",
                        "horizon_resolved",
                    ),
                ),
                (
                    "relation with the metric",
                    (
                        "metric_points",
                        "metric_correlation",
                        "metric_correlation_p",
                        "metric_correlation_shift_p",
                        "metric_increment_correlation",
                        "metric_increment_correlation_p",
                        "metric_norm_spearman",
                        "metric_sigma1_spearman",
                        "pls_skill",
                        "pls_skill_mean",
                        "pls_skill_p",
                        "pls_rmse",
                        "pls_r2",
                        "pls_r2_mean",
                        "pls_r2_shift_p",
                    ),
                ),
            ),
            columns=(
                "relative_update",
                "drift_fraction",
                "increment_cosine",
                "changed_share",
                "temporal_pc1",
                "linear_r2",
                "rank1_share_last",
                "direction_cosine_mean",
                "gap21_last",
                "skill@damped(linear)",
            ),
            worst="relative_update",
            sentence=("drift_fraction", "Drift fraction {value}; of a random walk {null}."),
            panels=(
                ("trajectory_norms", "trajectory_cosines"),
                ("trajectory_rank1", "trajectory_sigma1"),
                ("trajectory_changed", "trajectory_depth"),
                ("trajectory_ranks", "trajectory_alignment"),
                ("trajectory_pca", "trajectory_skill"),
            ),
            null=(
                "random walk",
                "a random walk with the same step norms; of shares, an isotropic matrix",
            ),
        ),
        "lineage": Kind(
            title="Lineage",
            answer=LINEAGE,
            judge=KIN,
            model=(
                (
                    "distance",
                    (
                        "base_cosine",
                        "relative_update",
                        "precision_ratio",
                        "update_sparsity",
                        "equal_embeddings",
                    ),
                ),
                ("place", ("lineage_angle", "growth", "merge_weight", "copy_share")),
            ),
            columns=(
                "base_cosine",
                "relative_update",
                "update_sparsity",
                "lineage_angle",
                "growth",
                "precision_ratio",
                "equal_embeddings",
                "merge_weight",
                "copy_share",
            ),
            worst="relative_update",
            sentence=("relative_update", "The model is {value} of the candidate's size away."),
            panels=(("distances",),),
            null=("independent", "an update that knows nothing of the weights"),
            drops_empty=True,
            has_cautions=False,
        ),
    }
)

# Those about a base and a tuned model, which `compare` makes.
PAIR_KINDS = tuple(name for name, kind in KINDS.items() if kind.families)
