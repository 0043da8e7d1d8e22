"""Leading columns of Q and rows of R in W = Q·R, without factorising all of W."""

from __future__ import annotations

import torch
from torch import Tensor

from geoscope.linalg.operand import Operand
from geoscope.profile import stage

__all__ = ["leading_qr"]


@stage("qr")
def leading_qr(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Q[:, :k] (m, k) and R[:k] (k, n) of the Householder QR without pivoting, in fp64.

    W: (m, n), 1 ≤ k ≤ min(m, n). The first k reflectors depend on the first k columns alone, and
    R[:k] = Q[:, :k]ᵀ·W, upper trapezoidal; signs are LAPACK's.
    """
    Q, R = torch.linalg.qr(W[:, :k].double())
    rows = Operand(W[None]).left(Q.T.contiguous()[None])[0]
    rows[:, :k] = R
    return Q, rows
