"""The design: which runs there are, and in which order they are trained.

Every method × rate × task × seed is trained once. KL is a half-fraction of it: on where
method + rate + task + seed (their places in the lists) is odd, so that half of the runs of every
method, rate, task and seed have KL. A factorial of KL, too, would take twice the time and would ask
the main question no better. The first two blocks have both tasks and both seeds, and the order
within a block is shuffled: should time run out, what is there is balanced.

The boundary is a block of its own, added after the first: at rates a factor of four apart the rate,
and with it the size of the update, tells nearly every outcome.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest

from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import TASKS

__all__ = ["BLOCKS", "LEVELS", "MIDDLE", "RATES", "Run", "boundary", "design"]

# The middle of five learning rates, four times each other. By a pilot on another seed: 3e-5 hardly
# moved full training and 3e-3 destroyed it, 3e-4 and 3e-2 did so with LoRA, 1e-2 destroyed PiSSA.
# Starts that are not zero make a step act larger.
_FROM_ZERO = ("lora-r2", "lora-r8", "lora-r32", "rlpo", "dora")
MIDDLE = {
    method: 4e-4 if method == "full" else 3.2e-3 if method in _FROM_ZERO else 6.4e-4
    for method in METHODS
}
RATES = {
    method: tuple(float(f"{middle * 4.0**power:.2g}") for power in (-2, -1, 0, 1, 2))
    for method, middle in MIDDLE.items()
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
        return {"name": self.name, **asdict(self)}


def design(blocks: int = len(BLOCKS)) -> Iterator[Run]:
    """All runs of the first blocks, in the order of training: shuffled within a block.

    After the first block, whose outcomes it was chosen by, runs of the boundary alternate with
    those of the second.
    """
    for place, block in enumerate(BLOCKS[:blocks]):
        runs = _shuffled(_block(*block), place)
        if place == 1:
            runs = _alternating(_shuffled(boundary(), len(BLOCKS)), runs)
        yield from runs


def _shuffled(runs: list[Run], seed: int) -> list[Run]:
    return random.Random(seed).sample(runs, len(runs))


def _alternating(ours: list[Run], theirs: list[Run]) -> list[Run]:
    """One of ours, one of theirs, and so on; then what is left of the longer."""
    pairs = zip_longest(ours, theirs)
    return [run for pair in pairs for run in pair if run is not None]


def boundary() -> list[Run]:
    """Three rates between the largest that did not fail in the first block and the next."""
    task, seed = BLOCKS[0]
    return [
        Run(
            method,
            float(f"{rates[2 if method in _FROM_ZERO else 3] * 4.0**part:.2g}"),
            list(TASKS)[task],
            seed,
            kl=(place + step) % 2 == 1,
        )
        for place, (method, rates) in enumerate(RATES.items())
        for step, part in enumerate((0.25, 0.5, 0.75))
    ]


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
