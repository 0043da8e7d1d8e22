"""Which device computes, and in which precision it can."""

from __future__ import annotations

import torch

from geoscope.errors import OptionError

__all__ = ["resolve_device", "resolve_dtype"]


def resolve_device(given: str) -> torch.device:
    """The device of `--device auto|cpu|cuda[:N]|mps`. Raises OptionError when it is not there.

    `auto` takes CUDA where there is one, else the CPU: MPS has no fp64, so it has to be asked for.
    """
    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = given.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise OptionError(f"--device {given!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if kind == "cuda":
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= present:
            raise OptionError(
                f"--device {given}: this machine has {present} CUDA devices; use --device cpu"
            )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise OptionError("--device mps: no MPS device on this machine; use --device cpu")
    return torch.device(given)


def resolve_dtype(given: str, device: torch.device) -> str:
    """The compute dtype of `--dtype`. MPS has no fp64, so it needs float32 said aloud."""
    if given not in ("float64", "float32"):
        raise OptionError(f"--dtype {given!r} is not one of float64, float32")
    if device.type == "mps" and given == "float64":
        raise OptionError("--device mps has no float64; add --dtype float32 (wider tolerance)")
    return given
