"""Stage times of a stack of equal matrices, beside the device's own peaks.

The batched code for devices, called by name: with `--device cpu` it is that code which runs, and
not the one that geoscope takes there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from synthetic import update, weight
from torch import Tensor

from geoscope.linalg import Factors, Operand, factorise, principal_angles, stacked
from geoscope.linalg.certificate import Leading
from geoscope.linalg.stacked_leading import stacked_leading

__all__ = ["UPDATE_PAIR", "Peaks", "Stage", "clock", "peaks", "stages"]

K = 64
# Leading triplets: of the update (its pair) and of the base.
UPDATE_PAIR = "leading pair of the update"
LEADING = (8, 64)
# Rows of a Krylov block by the number of triplets, as in stacked_leading; for the nominal counts.
BLOCK_ROWS = {1: 4, 8: 8, 64: 16}
# Allowed: the spread of σ/σ1 over matrices that differ by the order of their rows (through the Gram
# matrix; from Krylov spaces), and VᵀV − I.
SPREAD = 1e-12
SPREAD_KRYLOV = 1e-9
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


def stacks(m: int, n: int, count: int) -> tuple[Tensor, Tensor]:
    """A synthetic pair in bf16 with its rows in `count` orders: all have the same spectra."""
    generator = torch.Generator().manual_seed(0)
    base = weight(m, n, generator).bfloat16()
    tuned = (base.float() + update(m, n, 1e-3 * float(base.float().norm()), generator)).bfloat16()
    together = [torch.stack([one.roll(i, 0) for i in range(count)]) for one in (base, tuned)]
    return together[0], together[1]


@dataclass
class _Found:
    """One stage in one round: seconds, what was seen, whether it passed, and what it came to."""

    seconds: float
    remark: str = ""
    sound: bool = True
    flops: float = 0.0
    bytes: float = 0.0


def stages(m: int, n: int, count: int, device: torch.device, rounds: int) -> list[Stage]:
    """Upload, Gram, eigenvalues, eigenvectors, long side, leading triplets; the whole; one svd."""
    base, tuned = stacks(m, n, count)
    found = [_round(base, tuned, device) for _ in range(rounds + 1)][1:]  # the first warms up
    return [
        Stage(
            (m, n),
            1 if name.endswith("one") else count,
            name,
            [one[name].seconds for one in found],
            found[-1][name].flops,
            found[-1][name].bytes,
            uploads=name == "upload",
            remark=found[-1][name].remark,
            sound=all(one[name].sound for one in found),
        )
        for name in found[-1]
    ]


def _round(base: Tensor, tuned: Tensor, device: torch.device) -> dict[str, _Found]:
    """Each stage once."""
    k = min(K, *base.shape[-2:])
    there, spent = clock(lambda: base.to(device, copy=True), device)
    found = {"upload": _Found(spent, bytes=2.0 * base.numel())}
    A, changed = Operand(there), Operand(tuned.to(device), there)
    found |= _gram_stages(A, k, device)
    found |= _leading_stages(A, changed, device)
    found |= _angle_stages(A, changed, k, device)
    values, spent = clock(lambda: factorise(A), device)
    found["factorise, values"] = _Found(spent, *_spread(values.S, SPREAD))
    whole, spent = clock(lambda: factorise(A, vectors=k, cuts=(min(8, k), k)), device)
    found[f"factorise, {k} vectors"] = _Found(spent, *_soundness(whole))
    single = there[0].float()
    _, spent = clock(lambda: torch.linalg.svd(single, full_matrices=False), device)
    found["torch.linalg.svd fp32, one"] = _Found(spent)
    return found


def _gram_stages(A: Operand, k: int, device: torch.device) -> dict[str, _Found]:
    """The parts of factorise; what they leave on the device is gone when this returns.

    Nominal counts: half of the full product, for the other half is its mirror image; 4/3·q³ for
    values and 6·q³ with all vectors, as LAPACK's.
    """
    (m, n), q, count = A.shape, min(A.shape), len(A)
    stored = 2.0 * A.plus.numel()
    G, spent = clock(lambda: stacked.gram(A.plus, A.minus), device)
    found = {
        "Gram": _Found(spent, flops=count * m * n * (q + 1.0), bytes=stored + 8.0 * G.numel()),
    }
    values, spent = clock(lambda: stacked.eigenpairs(G), device)
    found["eigenvalues"] = _Found(spent, *_faults(values), count * 4 * q**3 / 3, 8.0 * G.numel())
    pairs, spent = clock(lambda: stacked.eigenpairs(G, k), device)
    found["eigenvectors"] = _Found(spent, *_faults(pairs), count * 6.0 * q**3, 16.0 * G.numel())
    assert pairs.rows is not None
    rows, product = pairs.rows, stacked.right if A.is_tall else stacked.left
    _, spent = clock(lambda: product(A.plus, A.minus, rows), device)
    traffic = stored + 8.0 * count * k * (m + n)
    found["long side"] = _Found(spent, flops=2.0 * count * m * n * k, bytes=traffic)
    return found


def _leading_stages(A: Operand, changed: Operand, device: torch.device) -> dict[str, _Found]:
    """Block Krylov spaces; of updates one pair, which is what a trajectory takes."""
    wanted = {UPDATE_PAIR: (changed, 1), **{f"leading {k} of the base": (A, k) for k in LEADING}}
    found = {}
    for name, (operand, k) in wanted.items():
        if k + 17 > min(operand.shape):  # k + 1 and a block have to fit
            continue
        answers, spent = clock(lambda o=operand, k=k: stacked_leading(o, k), device)
        found[name] = _Found(spent, *_certificates(answers), *_krylov_work(operand, k, answers))
    return found


def _angle_stages(A: Operand, B: Operand, k: int, device: torch.device) -> dict[str, _Found]:
    """Angles between leading subspaces of two stacks; their small SVDs here and on the host."""
    q = min(A.shape)
    bases = [
        torch.linalg.eigh(stacked.gram(one.plus, one.minus)).eigenvectors[..., q - k :]
        for one in (A, B)
    ]
    _, spent = clock(lambda: principal_angles(*bases), device)
    overlap = bases[0].mT @ bases[1]
    _, here = clock(lambda: torch.linalg.svdvals(overlap), device)
    _, host = clock(lambda: torch.linalg.svdvals(overlap.cpu()).to(device), device)
    return {
        f"principal angles, {k}": _Found(spent),
        f"svdvals {k}×{k}": _Found(here),
        f"svdvals {k}×{k}, on the host": _Found(host),
    }


def _krylov_work(A: Operand, k: int, answers: list[Leading]) -> tuple[float, float]:
    """Nominal flops, fp32 most of them, and least traffic in bytes, as if all went to the end.

    The stored entries are read once before the iteration, twice after it. Each block multiplies the
    fp32 matrix twice, or the Gram matrix once, and is orthogonalised twice against the basis.
    """
    entries, q, count = A.plus.numel(), min(A.shape), len(A)
    dimension = max(one.dimension for one in answers)
    steps = dimension / BLOCK_ROWS[k]
    stored = 2.0 * entries * (1 if A.minus is None else 2)
    flops, traffic = 4.0 * count * q * dimension**2, 3 * stored
    if max(A.shape) >= 3 * q and k >= 4:
        flops += entries * (q + 1.0) + 2.0 * count * q * q * dimension
        return flops, traffic + 4.0 * count * q * q * steps
    return flops + 4.0 * entries * dimension, traffic + 4.0 * entries + 8.0 * entries * steps


def _faults(pairs: stacked.Eigenpairs) -> tuple[str, bool]:
    faults = [fault for fault in pairs.faults if fault]
    return (faults[0] if faults else "checks passed"), not faults


def _certificates(answers: list[Leading]) -> tuple[str, bool]:
    """What the certificates say, and whether equal spectra came out equal where they hold."""
    good = [one for one in answers if one.converged]
    worst = max((one.residual for one in good), default=0.0)
    said = f"{len(good)} of {len(answers)} converged, dimension "
    said += f"{max(one.dimension for one in answers)}, residual {worst:.0e}·σ1"
    if not good:
        return said, True  # a flat spectrum: the Gram route takes over
    remark, sound = _spread(torch.stack([one.S for one in good]), SPREAD_KRYLOV)
    return f"{said}; {remark}", sound


def _spread(S: Tensor, allowed: float) -> tuple[str, bool]:
    """Whether equal spectra came out equal."""
    spread = float(((S - S[:1]).abs() / S[:, :1]).max())
    sound = spread <= allowed
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
