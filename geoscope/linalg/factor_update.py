"""An update that is known by its factors, and what the tuned weight W0 + ΔW is with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg.operand import Operand
from geoscope.linalg.product import Product
from geoscope.linalg.storage import FloatFormat, effective_format, rounding_energy
from geoscope.profile import stage

__all__ = ["FactorUpdate", "squared_noise"]


@dataclass(frozen=True)
class FactorUpdate:
    """ΔW of a stack. noise: √(E‖error‖²) of ΔW, (b,), from the rounding of the stored factors.

    With dB, dA the rounding errors, each entry independent with variance ulp²/12, the error is
    s(dB·A + B·dA), of expected square s²Σ_k(‖dB_k‖²‖a_k‖² + ‖b_k‖²‖dA_k‖²) (ours). fmt: of B.
    nominal: r as it was asked for, where the product may have more.
    """

    product: Product
    noise: Tensor
    fmt: FloatFormat
    nominal: int

    @classmethod
    def of(cls, factors: Sequence[Tensor], *, nominal: int | None = None) -> FactorUpdate:
        """Of stacks B (b, m, r), A (b, r, n), scaling (b, 1) as stored, and where the product was
        not zero before training, the three of its start, which is taken off. nominal: default the
        rank of the first product."""
        parts = [factors[i : i + 3] for i in range(0, len(factors), 3)]
        if len(parts) == 2 and not bool(parts[1][0].any() and parts[1][1].any()):
            del parts[1]  # a start of zero, which would only double the rank
        products = [Product.of(B, A, scaling) for B, A, scaling in parts]
        squares = torch.stack([squared_noise(*part) for part in parts]).sum(0)
        whole = products[0] if len(products) == 1 else products[0] - products[1]
        rank = factors[0].shape[-1] if nominal is None else nominal
        return cls(whole, squares.sqrt(), effective_format(factors[0]), rank)

    @stage("entries")
    def over(self, base: Tensor) -> Tensor:
        """W0 + ΔW in fp64, (b, m, n); ΔW itself is never made."""
        product = self.product
        return torch.baddbmm(
            base.to(torch.float64), product.B * product.scale[:, None, :], product.A
        )

    def tuned_norm(self, base: Tensor) -> Tensor:
        """‖W0 + ΔW‖_F, (b,): √(‖W0‖² + 2⟨W0, ΔW⟩ + ‖ΔW‖²)."""
        W0, product = Operand(base), self.product
        images = W0.right(product.A.contiguous())  # a_kᵀW0ᵀ as rows, (b, r, m)
        inner = (images * (product.B * product.scale[:, None, :]).mT).sum(dim=(-2, -1))
        return (W0.norm().square() + 2 * inner + product.norm().square()).clamp_min(0).sqrt()


def squared_noise(B: Tensor, A: Tensor, scaling: Tensor) -> Tensor:
    """E‖error‖² of scaling·B·A from the rounding of B (b, m, r) and A (b, r, n), (b,)."""
    (energy, rounding), (energy2, rounding2) = (_energies(one) for one in (B.mT, A))
    both = (rounding * energy2 + energy * rounding2).sum(-1)
    return scaling.to(torch.float64).reshape(len(B), -1)[:, 0].square() * both


def _energies(rows: Tensor) -> tuple[Tensor, Tensor]:
    """‖row‖² and Σulp²/12 of each row, (b, r)."""
    fmt = effective_format(rows)
    wide = rows.to(torch.float64, copy=True).contiguous()
    return wide.square().sum(-1), rounding_energy(wide, fmt)
