"""Which devices compute, with how much memory, and in which precision they can."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from geoscope.errors import OptionError

__all__ = ["available_memory", "cores", "free_memory", "resolve_devices", "resolve_dtype"]

_DEVICE = re.compile(r"cpu|mps|cuda(?::(?P<index>0|[1-9][0-9]{0,3}))?")


def resolve_devices(given: str) -> tuple[torch.device, ...]:
    """The devices of `--device auto|cpu|cuda[:N]|mps`. Raises OptionError when one is not there.

    `cuda` is every CUDA device that is visible, `cuda:N` that one. `auto` takes CUDA where there is
    one, else the CPU: MPS has no fp64, so it has to be asked for.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every = tuple(torch.device("cuda", i) for i in range(present))
    if given == "auto":
        return every or (torch.device("cpu"),)
    match = _DEVICE.fullmatch(given)
    if match is None:
        raise OptionError(f"`device` {given!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if given.startswith("cuda"):
        if int(match["index"] or 0) >= present:
            raise OptionError(
                f"`device` {given}: this machine has {present} CUDA devices; use `device` cpu"
            )
        return every if match["index"] is None else (every[int(match["index"])],)
    if given == "mps" and not torch.backends.mps.is_available():
        raise OptionError("`device` mps: no MPS device on this machine; use `device` cpu")
    return (torch.device(given),)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that this process can have without swapping: of the machine, or its control group."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    return min([machine if match is None else 1024 * int(match[1]), *_group_memory()])


def _group_memory() -> Iterator[int]:
    """What the control groups of this process leave, of version 2 and of version 1."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current")
            root = Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        own = root / path.strip("/")
        for group in (own, *own.parents):
            limit, used = (_text(group / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():
                yield max(0, int(limit) - int(used))
            if group == root:
                break


def _text(path: Path) -> str:
    """A small file of the kernel's; nothing where there is none."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def free_memory(device: torch.device) -> int:
    """Bytes that work on a CUDA device can have: free ones, and what torch keeps for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def resolve_dtype(given: str, device: torch.device) -> str:
    """The compute dtype of `--dtype`. MPS has no fp64, so it needs float32 said aloud."""
    if given not in ("float64", "float32"):
        raise OptionError(f"`dtype` {given!r} is not one of float64, float32")
    if device.type == "mps" and given == "float64":
        raise OptionError("`device` mps has no float64; add `dtype` float32 (wider tolerance)")
    return given
