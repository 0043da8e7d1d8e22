"""fp32 products with all their bits, whatever the caller has switched on; roundoff of fp64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from geoscope.thresholds import THRESHOLDS

__all__ = ["CAUTION_ABOVE", "EPS", "UNRESOLVED_ABOVE", "full_precision"]

# Unit roundoff of fp64.
EPS = 2.0**-53
# ν, rounding over update, up to which a number of the leading directions is OK, and from which it
# is BELOW_RESOLUTION (docs/methods.md#floors).
CAUTION_ABOVE, UNRESOLVED_ABOVE = 0.2, THRESHOLDS["undetermined.precision_ratio"].value


class full_precision:
    """fp32 products with all their bits for the duration: TF32 would cut them to 10.

    The switch is one for the process. It is touched only where it stands elsewhere; of threads
    that overlap the first saves it and the last restores it.
    """

    _lock = threading.Lock()
    _inside = 0
    _undo: ClassVar[list[Callable[[], None]]] = []

    def __enter__(self) -> None:
        cls = full_precision
        with cls._lock:
            if cls._inside == 0:
                cls._undo += _forbid_tf32()
            cls._inside += 1

    def __exit__(self, *_: object) -> None:
        cls = full_precision
        with cls._lock:
            cls._inside -= 1
            while cls._inside == 0 and cls._undo:
                cls._undo.pop()()


def _forbid_tf32() -> list[Callable[[], None]]:
    """Sets the highest precision; how to undo it, nothing where it was set.

    torch has an older switch and, since 2.9, one for each backend. Reading the older one raises
    where only the newer was used; setting the older one sets both.
    """
    backends: list[Any] = [
        getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)
    ]
    newer = [(one, one.fp32_precision) for one in backends if hasattr(one, "fp32_precision")]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    if older == "highest" and all(now in ("none", "ieee") for _, now in newer):
        return []

    def restore() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, before in newer:
            backend.fp32_precision = "none"
            if backend.fp32_precision != before:  # not what it inherits
                backend.fp32_precision = before

    torch.set_float32_matmul_precision("highest")
    return [restore]
