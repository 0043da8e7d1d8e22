"""A table of providers, resolved by dependency: only what is needed is made, each thing once.

A name may have a parameter: the row that makes `angles.left@k` makes `angles.left@8`, with k = 8.
A name may have several rows; the first whose needs can all be had makes it. So one table serves
every kind of input: what cannot be made from the inputs at hand is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

__all__ = ["Provider", "Step", "names_made", "plan", "resolve"]


@dataclass(frozen=True, eq=False)
class Provider:
    """One row of a table: what a function makes, and from what.

    makes: names; of several, fn returns a tuple in this order. None stands for "absent".
    needs: names, the first arguments of fn in this order; where one is absent, so is what fn makes.
    fn: a pure function; with a parameter in its names it takes `k` by keyword.
    reuses: names of further arguments: passed if another row needs them anyway, else None.
    drops: names among `makes` that are let go after their last use.
    asks: name → what this row asks of it, for who computes that no further than is asked.
    """

    makes: tuple[str, ...]
    needs: tuple[str, ...]
    fn: Callable[..., Any]
    reuses: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    asks: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A provider with its parameter."""

    provider: Provider
    k: int | None

    @property
    def makes(self) -> tuple[str, ...]:
        return self._filled(self.provider.makes)

    @property
    def needs(self) -> tuple[str, ...]:
        return self._filled(self.provider.needs)

    @property
    def reuses(self) -> tuple[str, ...]:
        return self._filled(self.provider.reuses)

    def _filled(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.replace("@k", f"@{self.k}") for name in names)

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the provider makes of `values`; empty where a need is absent."""
        arguments = [values.get(name) for name in self.needs]
        if any(argument is None for argument in arguments):
            return {}
        keywords = {} if self.k is None else {"k": self.k}
        reused = [values.get(name) for name in self.reuses]
        result = self.provider.fn(*arguments, *reused, **keywords)
        results = result if len(self.makes) > 1 and result is not None else [result]
        pairs = zip(self.makes, results, strict=result is not None)
        return {name: value for name, value in pairs if value is not None}


def names_made(table: Sequence[Provider]) -> frozenset[str]:
    """Every name that a row makes, parameters as @k."""
    return frozenset(name for provider in table for name in provider.makes)


@lru_cache(maxsize=128)
def plan(
    table: tuple[Provider, ...], wanted: frozenset[str], given: frozenset[str]
) -> tuple[Step, ...]:
    """The steps that make what is wanted from what is given, in order of need and of the table.

    What cannot be made of it is left out. Raises ValueError for a name that no row makes, and for
    rows that need each other.
    """
    planner = _Planner(table, given)
    needed: dict[Step, None] = {}
    for name in sorted(wanted - given):
        if not planner.rows(name):
            raise ValueError(f"no provider makes {name}")
        planner.collect(name, needed)
    return _ordered(needed, table)


@dataclass(frozen=True)
class _Planner:
    table: tuple[Provider, ...]
    given: frozenset[str]
    steps: dict[str, Step | None] = field(default_factory=dict)

    def step(self, name: str, path: tuple[str, ...] = ()) -> Step | None:
        """The first row that can make a name; None where none can."""
        if name in path:
            raise ValueError(f"these need each other: {', '.join(path[path.index(name) :])}")
        if name not in self.steps:
            rows = self.rows(name)
            able = (row for row in rows if all(self._had(n, (*path, name)) for n in row.needs))
            self.steps[name] = next(able, None)
        return self.steps[name]

    def _had(self, name: str, path: tuple[str, ...]) -> bool:
        return name in self.given or self.step(name, path) is not None

    def rows(self, name: str) -> list[Step]:
        """Every row that makes a name; inputs have none."""
        stem, _, parameter = name.partition("@")
        template, k = (f"{stem}@k", int(parameter)) if parameter else (name, None)
        return [Step(row, k) for row in self.table if template in row.makes]

    def collect(self, name: str, needed: dict[Step, None]) -> None:
        """Adds the steps that a name needs."""
        step = None if name in self.given else self.step(name)
        if step is None or step in needed:
            return
        needed[step] = None
        for need in step.needs:
            self.collect(need, needed)


def _ordered(needed: Collection[Step], table: tuple[Provider, ...]) -> tuple[Step, ...]:
    makers = {name: step for step in needed for name in step.makes}
    place = {provider: i for i, provider in enumerate(table)}
    order: dict[Step, None] = {}

    def visit(step: Step) -> None:
        if step not in order:
            for name in (*step.needs, *step.reuses):
                if name in makers:
                    visit(makers[name])
            order[step] = None

    for step in sorted(needed, key=lambda step: (place[step.provider], step.k or 0)):
        visit(step)
    return tuple(order)


def resolve(steps: Sequence[Step], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the steps make of what is given, without what is dropped on the way."""
    values = dict(given)
    for step, over in zip(steps, _dropped(steps), strict=True):
        values |= step.run(values)
        for name in over:
            values.pop(name, None)
    return {name: value for name, value in values.items() if name not in given}


def _dropped(steps: Sequence[Step]) -> Iterator[list[str]]:
    """For each step, what nothing needs after it and may be let go."""
    brief = {name for step in steps for name in step.provider.drops}
    last = {
        name: i
        for i, step in enumerate(steps)
        for name in (*step.makes, *step.needs, *step.reuses)
        if name in brief
    }
    for i in range(len(steps)):
        yield [name for name, place in last.items() if place == i]
