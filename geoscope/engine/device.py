"""Which device computes, and in which precision it can."""

from __future__ import annotations

import re

import torch

from geoscope.errors import OptionError

__all__ = ["resolve_device", "resolve_dtype"]

_DEVICE = re.compile(r"cpu|mps|cuda(?::(?P<index>0|[1-9][0-9]*))?")


def resolve_device(given: str) -> torch.device:
    """The device of `--device auto|cpu|cuda[:N]|mps`. Raises OptionError when it is not there.

    `auto` takes CUDA where there is one, else the CPU: MPS has no fp64, so it has to be asked for.
    """
    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = _DEVICE.fullmatch(given)
    if match is None:
        raise OptionError(f"--device {given!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if given.startswith("cuda"):
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(match["index"] or 0) >= present:
            raise OptionError(
                f"--device {given}: this machine has {present} CUDA devices; use --device cpu"
            )
    if given == "mps" and not torch.backends.mps.is_available():
        raise OptionError("--device mps: no MPS device on this machine; use --device cpu")
    return torch.device(given)


def resolve_dtype(given: str, device: torch.device) -> str:
    """The compute dtype of `--dtype`. MPS has no fp64, so it needs float32 said aloud."""
    if given not in ("float64", "float32"):
        raise OptionError(f"--dtype {given!r} is not one of float64, float32")
    if device.type == "mps" and given == "float64":
        raise OptionError("--device mps has no float64; add --dtype float32 (wider tolerance)")
    return given
