"""Two tasks with a verifiable answer: addition of three-digit numbers, and sorting of digits.

Token ids are places in VOCABULARY, then EOS and PAD. `321+654=` asks for 123 + 456, least
significant digit first: `9750<eos>`. `>52914=` asks for the digits in order: `12459<eos>`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EOS", "PAD", "TASKS", "TOKENS", "Problems", "Task", "stream"]

VOCABULARY = "0123456789+=>"
PLUS, EQUALS, SORT, EOS, PAD = 10, 11, 12, 13, 14
TOKENS = 15
HELD_OUT = 1024


@dataclass(frozen=True)
class Task:
    """A task: its number of problems, what makes prompts and answers of their numbers, and the
    learning rate of its bases."""

    count: int
    base_rate: float
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]


def stream(seed: int, number: int) -> torch.Generator:
    """An independent random stream of a run or base; on the CPU, so that it repeats anywhere."""
    return torch.Generator().manual_seed(1000 * seed + number)


def _digits(numbers: Tensor, count: int) -> Tensor:
    """Decimal digits of each number, least significant first: (n, count)."""
    return torch.stack([numbers // 10**place % 10 for place in range(count)], dim=1)


def _addition(problems: Tensor) -> tuple[Tensor, Tensor]:
    a, b = problems // 1000, problems % 1000
    column = torch.ones(len(problems), 1, dtype=torch.long)
    prompts = torch.cat([_digits(a, 3), PLUS * column, _digits(b, 3), EQUALS * column], dim=1)
    return prompts, torch.cat([_digits(a + b, 4), EOS * column], dim=1)


def _sorting(problems: Tensor) -> tuple[Tensor, Tensor]:
    column, digits = torch.ones(len(problems), 1, dtype=torch.long), _digits(problems, 6)
    prompts = torch.cat([SORT * column, digits, EQUALS * column], dim=1)
    return prompts, torch.cat([digits.sort(dim=1).values, EOS * column], dim=1)


TASKS = {
    "addition": Task(10**6, 2e-3, _addition),
    "sorting": Task(10**6, 5e-4, _sorting),
}


class Problems:
    """All problems of a task, with two disjoint held-out sets that training never draws."""

    def __init__(self, task: str, seed: int) -> None:
        self.task = TASKS[task]
        order = torch.randperm(self.task.count, generator=stream(seed, 1))
        self.test = order[:HELD_OUT]
        self.validation = order[HELD_OUT : 2 * HELD_OUT]
        self.train = order[2 * HELD_OUT :]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Prompts and answers of `count` training problems, with replacement."""
        places = torch.randint(len(self.train), (count,), generator=generator)
        return self.task.encode(self.train[places])
