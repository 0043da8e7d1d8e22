"""What the methods of extrapolation are called, in the order of tables.

Loads no torch: help lists them. The methods themselves are in `methods.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NAMES"]

# name → a remark for help texts
NAMES: Mapping[str, str] = {
    "hold": "the last checkpoint",
    "two_point": "",
    "linear": "",
    "linear_origin": "",
    "relex": "",
    "relex_pinned": "",
    "spatial_rank1": "",
    "spatial_rank1_pinned": "",
    "alpha_rank1": "",
    "next": "trains networks: a minute or more",
}
