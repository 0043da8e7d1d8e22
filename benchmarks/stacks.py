"""Stage times of a stack of equal matrices through factorise, beside the device's own peaks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from synthetic import weight
from torch import Tensor

from geoscope.linalg import Factors, Operand, factorise

__all__ = ["Peaks", "Stage", "clock", "peaks", "stages"]

K = 64
# Allowed: the spread of σ/σ1 over matrices that differ by the order of their rows, and VᵀV − I.
SPREAD = 1e-12
ORTHONORMAL = 1e-11


@dataclass(frozen=True)
class Peaks:
    """fp64 products in flops a second; copies on the device and to it in bytes a second."""

    flops: float
    memory: float
    upload: float | None


@dataclass(frozen=True)
class Stage:
    """seconds: of each round. flops: nominal; bytes: least traffic, of memory or of the upload.

    sound: whether what it computed passed its check.
    """

    shape: tuple[int, int]
    count: int
    name: str
    seconds: list[float]
    flops: float = 0.0
    bytes: float = 0.0
    uploads: bool = False
    remark: str = ""
    sound: bool = True

    @property
    def median(self) -> float:
        return median(self.seconds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result, and seconds until the device was done."""
    wait(device)
    started = time.perf_counter()
    result = work()
    wait(device)
    return result, time.perf_counter() - started


def best(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    work()
    return min(clock(work, device)[1] for _ in range(repeats))


def peaks(device: torch.device) -> Peaks:
    """Measured on this device; on a CPU with smaller sizes."""
    cuda = device.type == "cuda"
    side, size = (8192, 1 << 27) if cuda else (1024, 1 << 23)
    return Peaks(
        flops=_product_rate(side, device),
        memory=_copy_rate(size, device),
        upload=_upload_rate(size // 4, device) if cuda else None,
    )


def _product_rate(side: int, device: torch.device) -> float:
    A = torch.ones(side, side, dtype=torch.float64, device=device)
    out = torch.empty_like(A)
    return 2 * side**3 / best(lambda: torch.mm(A, A, out=out), device)


def _copy_rate(size: int, device: torch.device) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.zeros(size, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    return 2 * 8 * size / best(lambda: target.copy_(source), device)


def _upload_rate(size: int, device: torch.device) -> float:
    pinned = torch.zeros(size, dtype=torch.float64, pin_memory=True)
    target = torch.empty(size, dtype=torch.float64, device=device)
    return 8 * size / best(lambda: target.copy_(pinned), device)


def stack(m: int, n: int, count: int) -> Tensor:
    """One synthetic weight in bf16 with its rows in `count` orders: all have the same spectrum."""
    one = weight(m, n, torch.Generator().manual_seed(0)).bfloat16()
    return torch.stack([one.roll(i, 0) for i in range(count)])


def stages(m: int, n: int, count: int, device: torch.device, rounds: int) -> list[Stage]:
    """Upload, Gram, eigenvalues, eigenvectors, long side; factorise as a whole; svd of one."""
    stored = stack(m, n, count)
    seconds: dict[str, list[float]] = {}
    notes: dict[str, tuple[str, bool]] = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, (spent, remark, sound) in _round(stored, device).items():
            seconds.setdefault(name, []).append(spent)
            notes[name] = remark, sound and notes.get(name, ("", True))[1]
    q, entries, kept = min(m, n), count * m * n, min(K, min(m, n))
    # Nominal counts: full product; 4/3·q³ for values and 6·q³ with all vectors, as LAPACK's.
    work = {
        "upload": (0.0, 2.0 * entries),
        "gram": (2.0 * entries * q, 8.0 * (entries + count * q * q)),
        "eigenvalues": (count * 4 * q**3 / 3, 8.0 * count * q * q),
        "eigenvectors": (6.0 * count * q**3, 16.0 * count * q * q),
        "long side": (2.0 * entries * kept, 8.0 * (entries + count * kept * (m + n))),
        "factorise, values": (0.0, 0.0),
        "factorise, 64 vectors": (0.0, 0.0),
        "torch.linalg.svd fp32, one": (0.0, 0.0),
    }
    return [
        Stage(
            (m, n),
            1 if name.endswith("one") else count,
            name,
            seconds[name][1:],
            *work[name],
            uploads=name == "upload",
            remark=notes[name][0],
            sound=notes[name][1],
        )
        for name in work
    ]


_Found = dict[str, tuple[float, str, bool]]


def _round(stored: Tensor, device: torch.device) -> _Found:
    """Each stage once: seconds, remark, whether its check passed."""
    k = min(K, *stored.shape[-2:])
    there, spent = clock(lambda: stored.to(device, copy=True), device)
    found: _Found = {"upload": (spent, "", True)}
    A = Operand(there)
    found |= _gram_stages(A, k, device)
    values, spent = clock(lambda: factorise(A), device)
    found["factorise, values"] = spent, *_consistency(values.S)
    whole, spent = clock(lambda: factorise(A, vectors=k, cuts=(8, k)), device)
    found["factorise, 64 vectors"] = spent, *_soundness(whole)
    single = there[0].float()
    _, spent = clock(lambda: torch.linalg.svd(single, full_matrices=False), device)
    found["torch.linalg.svd fp32, one"] = spent, "", True
    return found


def _gram_stages(A: Operand, k: int, device: torch.device) -> _Found:
    """The parts of factorise; what they leave on the device is gone when this returns."""
    gram, first = clock(A.gram, device)
    _, second = clock(lambda: torch.linalg.eigvalsh(gram), device)
    (_, basis), third = clock(lambda: torch.linalg.eigh(gram), device)
    short = basis.flip(-1)[..., :k].mT.contiguous()
    _, fourth = clock(lambda: A.right(short) if A.is_tall else A.left(short), device)
    names = ("gram", "eigenvalues", "eigenvectors", "long side")
    spent = (first, second, third, fourth)
    return {name: (one, "", True) for name, one in zip(names, spent, strict=True)}


def _consistency(S: Tensor) -> tuple[str, bool]:
    """Whether equal spectra came out equal."""
    spread = float(((S - S[:1]).abs() / S[:, :1]).max())
    sound = spread <= SPREAD
    return f"equal spectra {'agree' if sound else 'DIFFER'}: {spread:.0e}·σ1", sound


def _soundness(found: Factors) -> tuple[str, bool]:
    """How the stack was done, and whether its vectors are orthonormal."""
    assert found.Vh is not None
    unit = torch.eye(found.Vh.shape[-2], dtype=torch.float64, device=found.Vh.device)
    off = float((found.Vh @ found.Vh.mT - unit).abs().max())
    counts: dict[str, int] = {}
    for method in found.methods:
        how = method["how"] + (f" ({method['fallback']})" if method["fallback"] else "")
        counts[how] = counts.get(how, 0) + 1
    said = ", ".join(f"{count} × {how}" for how, count in counts.items())
    sound = off <= ORTHONORMAL
    return f"{said}; VᵀV − I {'' if sound else 'TOO LARGE: '}{off:.0e}", sound
