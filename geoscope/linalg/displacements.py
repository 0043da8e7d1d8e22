"""Inner products of what leads from one weight to others of its shape, and affine combinations.

G holds the inner products of [W, X_1 − W, …, X_n − W]: all distances between these weights, and
their angles, follow from it without the cancellation that inner products of whole weights have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geoscope.profile import stage

__all__ = ["affine_weights", "displacement_gram", "squared_distances"]

_BLOCK = 1 << 18  # entries of one step


@stage("entries")
def displacement_gram(weight: Tensor, others: Sequence[Tensor]) -> Tensor:
    """G (n + 1, n + 1) in fp64 on the CPU, of one stored weight (any shape) and n others."""
    flat = [each.reshape(-1) for each in (weight, *others)]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device="cpu")
    for begin in range(0, flat[0].numel(), _BLOCK):
        rows = torch.stack([each[begin : begin + _BLOCK].double().cpu() for each in flat])
        rows[1:] -= rows[0]
        gram += rows @ rows.T
    return gram


def squared_distances(gram: Tensor) -> Tensor:
    """‖X_i − X_j‖² between all n + 1 weights, X_0 = W, of G (…, n + 1, n + 1)."""
    inner = gram.clone()
    inner[..., 0, :] = inner[..., :, 0] = 0
    own = inner.diagonal(dim1=-2, dim2=-1)
    return (own[..., :, None] + own[..., None, :] - 2 * inner).clamp_min(0)


def affine_weights(inner: Tensor) -> tuple[Tensor, Tensor]:
    """Weights α (…, s) that sum to 1 with the least ‖Σα_i d_i‖², and that least value (…,).

    inner: ⟨d_i, d_j⟩ (…, s, s) with d_i = X_i − W, so that Σα_i X_i is the nearest to W of the
    affine hull. By least squares on d_i − d_1, of the least norm where the hull is degenerate.
    """
    size = inner.shape[-1]
    lines = torch.eye(size, dtype=inner.dtype, device=inner.device)[1:]
    lines[:, 0] = -1
    normal = lines @ inner @ lines.T
    target = -(lines @ inner[..., :1])
    found = torch.linalg.lstsq(normal, target, driver="gelsd").solution
    weights = (lines.T @ found)[..., 0]
    weights[..., 0] += 1
    least = (weights[..., None, :] @ inner @ weights[..., :, None])[..., 0, 0]
    return weights, least.clamp_min(0)
