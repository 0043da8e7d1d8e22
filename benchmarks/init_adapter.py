"""Seconds of GeoRA factors for one layer, beside the recipe of two full SVDs and PEFT's PiSSA.

With --rlpo in place of these: RLPO beside PiSSA in the layout residual, whose rewritten weight and
errors of the start are part of it; no file is written.

One thread each, every method in every round on the same matrix. The recipe is timed by its two
torch.linalg.svd in fp32 alone (of the matrix turned tall), without its quantiles and masks; PEFT by
LoRA layers with init_lora_weights="pissa" on an nn.Linear of the same weights. Errors are sines of
the subspace of W_geo, left side, against an fp64 SVD of the same W_geo (with --errors). Nulls are
computed once a shape and a process; their seconds stand apart. Variables that steer BLAS are set
aside. Prints Markdown.

    python benchmarks/init_adapter.py [--rank 16] [--rounds 3] [--family qwen2.5-1.5b] [--errors]
    python benchmarks/init_adapter.py --rlpo [--rank 16] [--rounds 3] [--family qwen2.5-1.5b]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from machine import set_aside_variables
from peft import LoraConfig, get_peft_model
from synthetic import FAMILIES, weight
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from geoscope.adapters.geora import geora
from geoscope.adapters.layouts import residual, start_error
from geoscope.adapters.pissa import pissa
from geoscope.adapters.rlpo import rlpo
from geoscope.linalg.head import head_triplets
from geoscope.linalg.iid import iid_cut, iid_top_share
from geoscope.linalg.masked import keep_small


def two_svds(tall: Tensor) -> None:
    for _ in range(2):
        torch.linalg.svd(tall, full_matrices=False)


def peft_pissa(model: nn.Module, rank: int) -> None:
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights="pissa"
    )  # pyright: ignore
    get_peft_model(model, config)  # pyright: ignore


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def seconds(W: Tensor, rank: int, rounds: int) -> dict[str, list[float]]:
    """Method → seconds in each round."""
    single = W.float()
    tall = single if W.shape[0] >= W.shape[1] else single.T.contiguous()
    found: dict[str, list[float]] = {"geora": [], "two SVDs": [], "PEFT pissa": []}
    for _ in range(rounds):
        found["geora"].append(timed(lambda: geora(W, rank)))
        found["two SVDs"].append(timed(lambda: two_svds(tall)))
        model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
        model[0].weight.data = single.clone()  # pyright: ignore
        found["PEFT pissa"].append(timed(lambda model=model: peft_pissa(model, rank)))
    return found


def errors(W: Tensor, rank: int) -> tuple[float, float]:
    """Sines of the subspaces of W_geo: geoscope's, and that of an fp32 SVD."""
    base = head_triplets(W, rank)
    kept = keep_small(W, base.U, base.S[:-1], base.Vh, 0.2).kept
    kept = kept if W.shape[0] >= W.shape[1] else kept.T.contiguous()
    truth = torch.linalg.svd(kept.double(), full_matrices=False).U[:, :rank]
    single = torch.linalg.svd(kept.float(), full_matrices=False).U[:, :rank].double()
    ours = head_triplets(kept, rank).U

    def sine(U: Tensor) -> float:
        return float(torch.linalg.matrix_norm(U - truth @ (truth.T @ U), 2))

    return sine(ours), sine(single)


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def pissa_with_residual(W: Tensor, rank: int) -> None:
    factors = pissa(W, rank)
    residual(W, factors, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        start_error(W, factors, "residual", dtype=dtype)


def table_of_rlpo(rank: int, rounds: int, shapes: dict[str, tuple[int, int]]) -> None:
    """One line a matrix: seconds of both, in turn in every round, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    totals = [0.0, 0.0]
    print("| matrix | rlpo, s | pissa with residual, s | ratio |\n|---|--:|--:|--:|")
    for name, (m, n) in shapes.items():
        W = weight(m, n, generator).bfloat16()
        iid_cut(m, n, rank, 0)  # kept for the shape
        taken = [
            (timed(lambda W=W: rlpo(W, rank)), timed(lambda W=W: pissa_with_residual(W, rank)))
            for _ in range(rounds)
        ]
        both = [[round_[side] for round_ in taken] for side in (0, 1)]
        ours, theirs = map(median, both)
        totals = [totals[0] + ours, totals[1] + theirs]
        row = f"| {name} {m}×{n} | {spread(both[0])} | {spread(both[1])} | {ours / theirs:.2f} |"
        print(row, flush=True)
    print(f"| layer | {totals[0]:.2f} | {totals[1]:.2f} | **{totals[0] / totals[1]:.2f}** |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen2.5-1.5b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--errors", action="store_true", help="also against fp64 SVDs (slow)")
    parser.add_argument("--rlpo", action="store_true", help="RLPO beside PiSSA with its residual")
    given = parser.parse_args()
    if set_aside_variables():  # BLAS has read them by now: begin again without them
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    totals = {"geora": 0.0, "two SVDs": 0.0, "PEFT pissa": 0.0}
    nulls = 0.0
    print(f"rank {given.rank}, {given.rounds} rounds, torch {torch.__version__}, one thread\n")
    if given.rlpo:
        with threadpool_limits(1, user_api="blas"):
            table_of_rlpo(given.rank, given.rounds, FAMILIES[given.family])
        return
    print("| matrix | geora, s | two fp32 SVDs, s | ratio | PEFT pissa, s | ratio | sine | fp32 |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    with threadpool_limits(1, user_api="blas"):
        for name, (m, n) in FAMILIES[given.family].items():
            W = weight(m, n, generator).bfloat16()
            nulls += timed(lambda m=m, n=n: iid_top_share(m, n, given.rank, 0))
            found = seconds(W, given.rank, given.rounds)
            middle = {key: median(values) for key, values in found.items()}
            totals = {key: totals[key] + middle[key] for key in totals}
            sines = [f"{one:.0e}" for one in errors(W, given.rank)] if given.errors else ["", ""]
            print(
                f"| {name} {m}×{n} | {spread(found['geora'])} | {spread(found['two SVDs'])} "
                f"| {middle['two SVDs'] / middle['geora']:.1f} | {spread(found['PEFT pissa'])} "
                f"| {middle['PEFT pissa'] / middle['geora']:.1f} | {sines[0]} | {sines[1]} |",
                flush=True,
            )
    print(
        f"| layer | {totals['geora']:.2f} | {totals['two SVDs']:.2f} "
        f"| **{totals['two SVDs'] / totals['geora']:.1f}** | {totals['PEFT pissa']:.2f} "
        f"| **{totals['PEFT pissa'] / totals['geora']:.1f}** | | |"
    )
    print(f"\nNulls, once a shape: {nulls:.2f} s.")


if __name__ == "__main__":
    main()
