"""How the quantities that reports show are called; which of them a kind shows, `KINDS` says.

An id that ends in `@k` stands for every k in the report.
"""

from __future__ import annotations

from dataclasses import dataclass

from geoscope.errors import ReportError
from geoscope.kinds import KINDS, Kind

__all__ = ["OVERLAPS", "QUANTITIES", "Quantity", "kind_of"]


@dataclass(frozen=True)
class Quantity:
    """How one id is shown. `ratio` is the id that holds value over null, where there is one.

    above: a row of the model is left out where its value is not larger.
    """

    id: str
    head: str
    label: str
    reading: str
    unit: str = ""
    ratio: str | None = None
    above: float | None = None


_TABLE = (
    Quantity("relative_update", "ρ", "relative update ρ", "size of the update over the base's"),
    Quantity("precision_ratio", "ν", "rounding noise ν", "storage rounding over the update's size"),
    Quantity("base_cosine", "cosine", "cosine of base and tuned", "unrelated: 0 ± 1/√N"),
    Quantity("update_sparsity", "unchanged", "unchanged entries", "share of entries equal in bf16"),
    Quantity("nominal_rank", "r", "nominal rank r", "of the adapter's config"),
    Quantity("effective_rank_share", "eff./r_max", "effective rank/r_max", "amplitudes; 1: flat"),
    Quantity("entropy_rank_share", "entropy/r_max", "entropy rank/r_max", "energies; 1: flat"),
    Quantity("k90_share", "k90/r_max", "k90/r_max", "directions with 90 % of the energy"),
    Quantity("k99_share", "k99/r_max", "k99/r_max", "directions with 99 % of the energy"),
    Quantity("tail_ratio", "σ_r/σ1", "σ_r over σ1", "what the last direction still does"),
    Quantity("suggested_rank", "rank", "suggested rank", "for 90 % of the resolved energy"),
    Quantity("update.stable_rank", "stable rank", "stable rank", "energy over that of σ1"),
    Quantity(
        "update.participation_ratio",
        "particip.",
        "participation ratio",
        "directions with an even share",
    ),
    Quantity("update.entropy_rank", "entropy rank", "entropy rank", "directions, by energy"),
    Quantity("update.effective_rank", "eff. rank", "effective rank", "directions, by amplitude"),
    Quantity("update.top_share@1", "top share", "top-1 share", "energy on σ1"),
    Quantity("update.top_share@8", "top-8", "top-8 share", "energy on σ1 … σ8"),
    Quantity("update.k90", "k90", "k90", "directions that hold 90 % of the energy"),
    Quantity("update.k99", "k99", "k99", "directions that hold 99 % of the energy"),
    Quantity("update.signal_rank", "signal", "signal rank", "σ above the noise edge"),
    Quantity(
        "energy_two_sided@k",
        "C_LR({k})",
        "captured C_LR({k})",
        "update's energy in the base's top {k} × {k}",
        ratio="lift@k",
    ),
    Quantity(
        "energy_right@k", "C_R({k})", "captured C_R({k})", "the same, base's top {k} on the right"
    ),
    Quantity(
        "energy_left@k", "C_L({k})", "captured C_L({k})", "the same, base's top {k} on the left"
    ),
    Quantity("lift@k", "lift({k})", "lift of C_LR({k})", "C_LR over its isotropic value"),
    Quantity(
        "versus_base@k", "C_LR/E_{k}", "C_LR({k}) over base's E_{k}", "1: as the base's own energy"
    ),
    Quantity(
        "energy_of_base@k",
        "of W0({k})",
        "C_LR({k}) of W0 alone",
        "of the part of ΔW along W0",
        above=0.05,
    ),
    Quantity("outside_span", "outside", "outside the base's span", "share of energy"),
    Quantity("auc_right", "AUC right", "area under C_R", "mean of C_R over all k"),
    Quantity("auc_left", "AUC left", "area under C_L", "mean of C_L over all k"),
    Quantity(
        "angle_left_mean@k",
        "angle L({k})",
        "mean angle left, k = {k}",
        "base's top {k} to tuned's",
        unit="rad",
    ),
    Quantity(
        "angle_right_mean@k",
        "angle R({k})",
        "mean angle right, k = {k}",
        "base's top {k} to tuned's",
        unit="rad",
    ),
    Quantity("gap@k", "gap({k})", "gap of the base at {k}", "small: the angles are fragile"),
    Quantity("nss", "NSS", "spectral shift NSS", "change of σ over the base's σ"),
    Quantity(
        "spectral_share",
        "NSS/ρ",
        "spectral share NSS/ρ",
        "part of the update that changes σ",
        ratio="spectral_lift",
    ),
    Quantity("spectral_lift", "spec. lift", "spectral lift", "NSS/ρ over its isotropic value"),
    Quantity("rank_ratio", "rank ratio", "effective rank ratio", "tuned over base"),
    Quantity("stable_rank_ratio", "st. ratio", "stable rank ratio", "tuned over base"),
    Quantity("intruders", "intruders", "intruders left", "new leading directions; not causal"),
    Quantity("intruder_energy", "intr. energy", "energy of intruders left", "of the leading ten"),
    Quantity("intruders_right", "intr. right", "intruders right", "as above, right side"),
    Quantity("mask_overlap_low", "mask low", "mask overlap, low", "changed entries on small ones"),
    Quantity("mask_lift_low", "lift low", "mask lift, low", "over its matched null"),
    Quantity(
        "mask_overlap_principal",
        "mask princ.",
        "mask overlap, principal",
        "changed entries on principal ones",
    ),
    Quantity("mask_lift_principal", "lift princ.", "mask lift, principal", "over its matched null"),
    Quantity("tau_spec", "τ spec", "threshold τ_spec", "of |W_r|, at quantile rho"),
    Quantity("tau_euc", "τ euc", "threshold τ_euc", "of |W|, at quantile rho"),
    Quantity("density_spec", "spec", "density, spectral mask", "entries with |W_r| ≤ τ_spec"),
    Quantity("density_euc", "euc", "density, magnitude mask", "entries with |W| ≤ τ_euc"),
    Quantity("density_union", "mask", "density of the mask", "in either of the two"),
    Quantity("density_intersection", "both", "density of the intersection", "in both"),
    Quantity("jaccard", "Jaccard", "Jaccard of the two", "intersection over union"),
    Quantity("masked_energy", "masked E", "masked energy", "‖W_geo‖² over ‖W‖²"),
    Quantity("captured_energy", "E_r", "captured energy E_r", "of what was decomposed, in rank r"),
    Quantity("gap", "gap", "gap at r", "the smallest; small: the subspace is ill-conditioned"),
    Quantity("head_energy", "head E", "head energy", "of s·B₀A₀ on the base's leading r"),
    Quantity("relative_norm", "‖sB₀A₀‖/‖W‖", "relative norm", "of s·B₀A₀ over the weight's"),
    Quantity(
        "reconstruction_error",
        "start error",
        "start error, relative",
        "the largest, as the files are written",
    ),
    Quantity("drift_fraction", "φ", "drift fraction φ", "energy of an interval that is drift"),
    Quantity(
        "drift_fraction_corrected", "φ corr.", "φ without rounding", "the same, rounding subtracted"
    ),
    Quantity("drift_p", "p", "sign-flip p", "chance that a walk shows as much"),
    Quantity("increment_cosine", "incr. cos", "increment cosine", "neighbouring increments"),
    Quantity(
        "increment_cosine_corrected", "cos corr.", "cosine without rounding", "rounding subtracted"
    ),
    Quantity("straightness", "straight", "straightness", "distance over length of the path"),
    Quantity("curvature", "curvature", "curvature", "change of velocity over mean speed"),
    Quantity("step_precision_ratio", "ν(δ)", "rounding of a step ν(δ)", "below .6 to be resolved"),
    Quantity("path_length", "length", "path length", "Σ‖δ_i‖"),
    Quantity("changed_share", "changed", "entries changed in a step", "as stored; mean of steps"),
    Quantity("sync_share", "sync", "bytes of a weight sync", "of a full copy; 32-bit positions"),
    Quantity("sync_share_gaps", "gaps", "the same, positions as gaps", "of 16 bits where they fit"),
    Quantity("sync_break_even", "even", "equal to a full copy at", "share of changed entries"),
    Quantity("sync_bytes", "bytes", "bytes of a sync, a step", "32-bit positions and values"),
    Quantity("depth_centre", "centre", "centre of the update, block", "of its energy, last step"),
    Quantity("temporal_pc1", "pc1", "temporal pc1", "variance on one direction (RELEX)"),
    Quantity("temporal_pc1_centred", "pc1 centred", "temporal pc1, centred", "around the mean"),
    Quantity("rank1_coefficient_r2", "R² c1", "R² of its coefficient", "on a line in t"),
    Quantity("linear_r2", "R² line", "R² of a line", "all of the update, with intercept"),
    Quantity("linear_r2_origin", "R² origin", "R² of a line from the base", "without intercept"),
    Quantity("scalar_r2_median", "R² entry", "median R² of an entry", "on a line (RLVR-Linearity)"),
    Quantity("scalar_r2_share", "R² > .7", "entries with R² above .7", "of those that are counted"),
    Quantity("scalar_r2_kept", "counted", "entries counted", "those that move, or pass the filter"),
    Quantity("rank1_share_last", "rank-1", "spatial rank-1 share", "σ1² over ‖Δ‖², last step"),
    Quantity("norm_fraction", "σ1/‖Δ‖", "norm fraction (AlphaRL)", "σ1 over ‖Δ‖, last step"),
    Quantity("gap21_last", "σ2/σ1", "σ2/σ1", "above .9 the direction is ill-defined"),
    Quantity(
        "direction_cosine_mean", "dir. cos", "cosine of neighbouring pairs", "of σ1 directions"
    ),
    Quantity("rank1_linearity", "R² rank-1", "R² of a line, rank-1 part", "of σ1·u·vᵀ over t"),
    Quantity("sigma1_exponent", "exponent", "exponent of σ1", "1 drift, ½ diffusion"),
    Quantity("skill@two_point", "two-point", "skill: two-point", "held out, over hold"),
    Quantity("skill@linear", "linear", "skill: linear", "held out, over hold"),
    Quantity("skill@damped(linear)", "damped", "skill: linear, damped", "held out, over hold"),
    Quantity("skill@relex", "RELEX", "skill: RELEX", "held out, over hold"),
    Quantity("skill@relex_pinned", "pinned", "skill: RELEX, pinned", "held out, over hold"),
    Quantity(
        "skill@spatial_rank1_pinned", "spatial", "skill: spatial rank 1", "σ1, u and v moved on"
    ),
    Quantity("skill@auto", "auto", "skill: auto", "each matrix its best so far"),
    Quantity("horizon", "horizon", "credible horizon, in steps", "0: none"),
    Quantity(
        "horizon_resolved", "resolved", "the same above rounding", "what rounding cannot explain"
    ),
    Quantity("metric_points", "points", "checkpoints with a value", "of the metric"),
    Quantity("metric_correlation", "corr c1", "correlation of c1", "of the first temporal one"),
    Quantity("metric_correlation_p", "p", "p, metric shuffled", "two that rise go together"),
    Quantity("metric_correlation_shift_p", "p shift", "p, metric shifted", "around; ≥ 1/points"),
    Quantity(
        "metric_increment_correlation", "corr δ", "correlation of increments", "of c1 and metric"
    ),
    Quantity("metric_increment_correlation_p", "p", "p, metric shuffled", "of the increments'"),
    Quantity("metric_norm_spearman", "ρ ‖Δ‖", "Spearman of ‖Δ‖", "rank correlation"),
    Quantity("metric_sigma1_spearman", "ρ σ1", "Spearman of σ1", "rank correlation"),
    Quantity("pls_skill", "PLS skill", "PLS on u1: held-out skill", "over the last value seen"),
    Quantity("pls_skill_mean", "PLS skill", "the same, mean of matrices", "each fitted alone"),
    Quantity("pls_skill_p", "p", "p, metric shuffled", "of the held-out skill"),
    Quantity("pls_rmse", "RMSE", "PLS on u1: held-out RMSE", "in units of the metric"),
    Quantity(
        "pls_r2", "R² PLS", "PLS on u1: R² in sample", "null: metric shuffled; void without skill"
    ),
    Quantity("pls_r2_mean", "R² PLS", "the same, mean of matrices (AlphaRL)", "void without skill"),
    Quantity("pls_r2_shift_p", "p shift", "p, metric shifted", "of R² in sample"),
    Quantity(
        "lineage_angle", "angle", "angle at the candidate", "90°: between, less: not", unit="rad"
    ),
    Quantity("growth", "growth", "growth of ‖W‖² over ‖ΔW‖²", "below 0: perhaps the younger one"),
    Quantity("equal_embeddings", "vocabulary", "embedding and head equal", "share of those read"),
    Quantity("merge_weight", "weight", "weight in the merge", "all sum to 1"),
    Quantity("copy_share", "rounded", "rounding over distance", "1: a copy in coarser numbers"),
)

QUANTITIES = {quantity.id: quantity for quantity in _TABLE}

# Overlaps of two updates, the telling ones first; others follow under their ids.
OVERLAPS = (
    Quantity("update_cosine", "cosine", "", ""),
    Quantity("phi_left@8,8", "φ L(8,8)", "", ""),
    Quantity("phi_right@8,8", "φ R(8,8)", "", ""),
    Quantity("update_angle_left_mean@k", "angle L({k})", "", "", unit="rad"),
    Quantity("mask_jaccard", "Jaccard", "", ""),
    Quantity("sign_conflict", "conflict", "", ""),
    Quantity("changed_shared", "in both", "", ""),
    Quantity("changed_only_a", "in one", "", ""),
    Quantity("changed_only_b", "in other", "", ""),
    Quantity("head_cosine", "heads", "", ""),
    Quantity("residual_cosine", "rests", "", ""),
    Quantity("update_angle_right_mean@k", "angle R({k})", "", "", unit="rad"),
    Quantity("angle_at_model", "at the model", "", "", unit="rad"),
    Quantity("angle_at_first", "at the first", "", "", unit="rad"),
    Quantity("angle_at_second", "at the second", "", "", unit="rad"),
)


def kind_of(name: str) -> Kind:
    """The table of a kind. Raises ReportError for a kind that has none."""
    if name not in KINDS:
        raise ReportError(
            f"a report of kind {name!r} has no table here (known: {', '.join(sorted(KINDS))}); "
            "write .json or .csv"
        )
    return KINDS[name]
