"""What is worth knowing about an initialisation: ids, values, nulls.

See docs/methods.md#facts-of-a-start.

tau_spec, tau_euc        thresholds of the mask
density_spec, _euc, _union, _intersection    part of the entries at or below them; ties are kept
jaccard                  intersection over union; rho/(2 − rho) if the two were independent
masked_energy            ‖W_geo‖²/‖W‖²
captured_energy          E_r(W_geo), of RLPO E_r(W), of RLMO the last r triplets' part of ‖W‖²;
                         beside that of a Gaussian matrix of the shape
gap                      (σ_r − σ_{r+1})/σ_r of the matrix whose triplets are taken, of RLMO
                         (σ_{q−r} − σ_{q−r+1})/σ_{q−r}, q = min(m, n)
head_energy              C_R(r) of s·B0·A0: its energy on W's leading r right directions; null r/n
relative_norm            s‖B0·A0‖_F/‖W‖_F
reconstruction_error     of the files; measured where they are written, so not here
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from geoscope.linalg.masked import Masked
from geoscope.records import Status

__all__ = ["FACTS", "ILL_CONDITIONED", "captured", "completed", "gap_note", "mask_facts"]

# In the order of a report.
FACTS = (
    *("tau_spec", "tau_euc", "density_spec", "density_euc", "density_union"),
    *("density_intersection", "jaccard", "masked_energy", "captured_energy", "gap"),
    *("head_energy", "relative_norm"),
)

# Relative gap below which fp32 arithmetic, or another machine's fp32, turns the subspace by more
# than a thousandth.
ILL_CONDITIONED = 1e-3

Facts = dict[str, float | None]


def mask_facts(mask: Masked, norm: float) -> Facts:
    """The facts of the mask; norm: ‖W‖_F > 0."""
    total = mask.kept.numel()
    both = mask.count_spec + mask.count_euc - mask.count_union
    return {
        "tau_spec": mask.spec.tau,
        "tau_euc": mask.euc.tau,
        "density_spec": mask.count_spec / total,
        "density_euc": mask.count_euc / total,
        "density_union": mask.count_union / total,
        "density_intersection": both / total,
        "jaccard": both / mask.count_union,
        "masked_energy": mask.energy / norm**2,
    }


def captured(S: Tensor, Vh: Tensor, leading: Tensor) -> float:
    """C_R(r) = Σ_i σ_i²‖V_rᵀv_i‖²/Σσ² of U·diag(S)·Vh. S: (r,), Vh: (r, n), leading: (r, n)."""
    energy = S.square()
    return float((energy @ (Vh @ leading.T).square().sum(-1)) / energy.sum())


def gap_note(gap: float | None, values: str = "σ_r and σ_r+1") -> tuple[str, ...]:
    """A line for the user where the singular values at the cut are nearly equal; the same for all
    matrices. values: how it calls them."""
    if gap is None or gap >= ILL_CONDITIONED:
        return ()
    return (
        f"ill-conditioned subspace: {values} differ by less than {ILL_CONDITIONED:g} of "
        "themselves, so that rounding and other hardware may turn it; see `gap`",
    )


def completed(facts: Mapping[str, float | None]) -> tuple[Facts, dict[str, Status]]:
    """All FACTS, in order, and a status for each that is missing: it does not apply."""
    whole = {key: facts.get(key) for key in FACTS}
    return whole, {key: Status.NOT_APPLICABLE for key, value in whole.items() if value is None}
