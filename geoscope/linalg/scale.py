"""Powers of two that bring numbers near 1, and the sizes at which they are needed.

Gram matrices and Krylov spaces work with squares. Where these leave the range of the format, in
which they are held, a matrix is divided by a power of two before and its values are multiplied by
it after: both are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["outside", "power_of_two"]

# Sums of squares (traces of Gram matrices) that fp64 and fp32 work holds with all digits: products
# of two of them are normal numbers, and so is what is 2^53 or 2^24 times smaller than they are.
_RANGE = {torch.float64: (2.0**-450, 2.0**450), torch.float32: (2.0**-50, 2.0**50)}


def outside(squares: Tensor, dtype: torch.dtype) -> bool:
    """Whether a sum of squares is so large, so small, zero or no number that work in `dtype` would
    lose digits."""
    least, most = _RANGE[dtype]
    return not bool(((squares >= least) & (squares <= most)).all())


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two ≤ x for x > 0; 1 elsewhere."""
    return torch.where(x > 0, x / (2 * torch.frexp(x).mantissa), 1.0)
