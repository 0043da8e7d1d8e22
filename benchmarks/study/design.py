"""The design: which runs there are, and in which order they are trained.

Every method × rate × task × seed is trained once. KL is a half-fraction of it: on where
method + rate + task + seed (their places in the lists) is odd, so that half of the runs of every
method, rate, task and seed have KL. A factorial of KL, too, would take twice the time and would ask
the main question no better. The first two blocks have both tasks and both seeds, and the order
within a block is shuffled: should time run out, what is there is balanced.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import TASKS

__all__ = ["BLOCKS", "LEVELS", "RATES", "Run", "design"]

# The middle of five learning rates, four times each other. By a pilot on another seed: 3e-5 hardly
# moved full training and 3e-3 destroyed it, 3e-4 and 3e-2 did so with LoRA, 1e-2 destroyed PiSSA.
# Starts that are not zero make a step act larger.
_FROM_ZERO = ("lora-r2", "lora-r8", "lora-r32", "rlpo", "dora")
_MIDDLE = {
    method: 4e-4 if method == "full" else 3.2e-3 if method in _FROM_ZERO else 6.4e-4
    for method in METHODS
}
RATES = {
    method: tuple(float(f"{middle * 4.0**power:.2g}") for power in (-2, -1, 0, 1, 2))
    for method, middle in _MIDDLE.items()
}
# (task, seed) of each block; the first four are the study
BLOCKS = ((0, 0), (1, 1), (0, 1), (1, 0), (0, 2), (1, 2))
LEVELS = 5


@dataclass(frozen=True)
class Run:
    """One run: its method, learning rate, task, seed, and whether it has KL to the base."""

    method: str
    rate: float
    task: str
    seed: int
    kl: bool

    @property
    def name(self) -> str:
        kl = "kl" if self.kl else "free"
        return f"{self.method}-{self.rate:.1e}-{self.task}-{self.seed}-{kl}"

    @property
    def base(self) -> str:
        return f"{self.task}-{self.seed}"

    @property
    def facts(self) -> dict[str, object]:
        return {"name": self.name} | asdict(self)


def design(blocks: int = len(BLOCKS)) -> Iterator[Run]:
    """All runs of the first blocks, in the order of training: shuffled within a block."""
    for place, block in enumerate(BLOCKS[:blocks]):
        yield from random.Random(place).sample(_block(*block), LEVELS * len(METHODS))


def _block(task: int, seed: int) -> list[Run]:
    """All methods and rates of a task and seed, each with KL or without."""
    return [
        Run(
            method,
            RATES[method][level],
            list(TASKS)[task],
            seed,
            kl=(place + level + task + seed) % 2 == 1,
        )
        for level in range(LEVELS)
        for place, method in enumerate(METHODS)
    ]
