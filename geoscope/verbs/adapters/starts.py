"""The starts of matrices: workers read, factorise and measure ahead, under a bound."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.layouts import residual, start_error
from geoscope.engine import matrix_boundary
from geoscope.engine.cache import ResultCache
from geoscope.errors import NumericsError, OptionError
from geoscope.models.checkpoint import Checkpoint
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.recall import recalled_factors
from geoscope.verbs.adapters.targets import Target

__all__ = ["COPIES_IN_WORK", "TRAINER", "Made", "Making", "Start", "computed"]

# dtypes in which a trainer may hold the base: the start error is measured for each.
TRAINER = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# fp32 copies of a matrix that work on it takes, the rewritten matrix among them.
COPIES_IN_WORK = 3


@dataclass(frozen=True)
class Start:
    """One matrix: its factors, the rewritten matrix as its file holds it, and the start errors.

    key: under which the cache holds the factors, None where it does not.
    is_recalled: whether they come from there.
    """

    factors: LoraFactors
    residual: Tensor | None
    errors: Mapping[str, float]
    key: str | None = None
    is_recalled: bool = False

    @property
    def without_tensors(self) -> Start:
        """The facts alone, which are small."""
        empty = torch.empty(0)
        return replace(self, factors=replace(self.factors, A=empty, B=empty), residual=None)


# What is made of one weight: a start for each of its matrices.
Made = tuple[Start, ...]


@dataclass(frozen=True)
class Making:
    """How the starts of a model are made.

    begun: of a weight, where nodes have made its factors.
    rewrites: whether the layout's rewritten matrices are made, too.
    """

    checkpoint: Checkpoint
    options: InitOptions
    device: torch.device
    cache: ResultCache | None
    begun: Callable[[Target], Made] | None = None
    rewrites: bool = True

    def made(self, target: Target) -> Made:
        """The starts of the matrices of one weight.

        A matrix without a start ends the whole: a start that leaves modules out is another
        training.
        """
        stored = self.checkpoint.read(target.info.name)
        matrices = [stored] if target.experts is None else [*stored]
        begun = [None] * len(matrices) if self.begun is None else self.begun(target)
        return tuple(
            self._start(W.T if target.is_turned else W, name, target, start)
            for name, W, start in zip(target.names, matrices, begun, strict=True)
        )

    def _start(self, W: Tensor, name: str, target: Target, begun: Start | None) -> Start:
        try:
            with matrix_boundary(name):
                return self._started(W.to(self.device), name, target, begun)
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from None
        except NumericsError as error:
            if "`exclude`" in str(error):
                raise
            way_out = f"leave it out with `exclude` '{target.info.name}'"
            raise NumericsError(f"{error}; nothing is written, {way_out}") from error

    def _started(self, W: Tensor, name: str, target: Target, begun: Start | None) -> Start:
        """The start of W (out, in)."""
        start = self._first(W, name) if begun is None else begun
        if not self.rewrites or self.options.chosen_layout != "residual":
            return start
        dtype = getattr(torch, self.options.residual_dtype or "float32")
        is_turned = target.info.transposed or target.is_turned
        written = residual(W, start.factors, dtype=dtype, transposed=is_turned)
        rewritten = written.weight.cpu()
        _refuse_overflow([written.error], rewritten)
        return replace(start, residual=rewritten, errors={"written": written.error, **start.errors})

    def _first(self, W: Tensor, name: str) -> Start:
        """The factors of W, and how far a trainer starts from it."""
        options, layout = self.options, self.options.chosen_layout
        chosen = options.method_options
        if options.initialisation.is_drawn:
            # Each matrix draws its own A; the seed of a null is shared by equal shapes.
            # 32 bits: the CPU's generator looks at no more.
            chosen["seed"] = zlib.crc32(f"{options.seed}:{name}".encode())
        factors, key, is_recalled = recalled_factors(W, options, chosen, self.cache)
        _refuse_overflow(factors.facts.values(), factors.A, factors.B)
        errors = dict.fromkeys(TRAINER, 0.0)
        if layout:
            errors = {
                trainer: start_error(W, factors, layout, dtype=dtype)
                for trainer, dtype in TRAINER.items()
            }
        _refuse_overflow(errors.values())
        return Start(factors, None, errors, key, is_recalled)


def computed(
    making: Making, targets: Sequence[Target], *, workers: int, room: int
) -> Iterator[Made]:
    """The starts of these weights in their order. Workers compute ahead while what they hold fits.

    room: entries in fp32 that may be in work or waiting; one weight is always let in.
    """
    waiting = deque(targets)
    running: deque[tuple[int, Future[Made]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            while waiting or running:
                used = sum(cost for cost, _ in running)
                while waiting and len(running) <= workers:
                    cost = COPIES_IN_WORK * math.prod(waiting[0].info.shape)
                    if running and used + cost > room:
                        break
                    job = pool.submit(copy_context().run, making.made, waiting.popleft())
                    running.append((cost, job))
                    used += cost
                yield running.popleft()[1].result()
        finally:
            for _, future in running:
                future.cancel()


def _refuse_overflow(numbers: Iterable[float | None], *tensors: Tensor) -> None:
    """Raises NumericsError for what is written and is not finite."""
    finite = all(number is None or math.isfinite(number) for number in numbers)
    if not (finite and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)):
        raise NumericsError(
            "the weights are too large or too small for factors in float32, or for the residual"
        )
