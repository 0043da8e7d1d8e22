"""Bars of a terminal: what is being done, how much of it, the time left, and what came last."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from geoscope.foreign import printable

__all__ = ["Bars"]

_LONGEST = 26  # letters of a name beside its bar


class Bars:
    """Bars on standard error, which vanish in the end; a line for each kind of work and file."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def between(self, tell: Callable[..., None]) -> Callable[..., None]:
        """What tells something in lines of its own, between the bars."""

        def told(*words: Any) -> None:
            self._bars.stop()
            tell(*words)
            self._bars.start()

        return told

    def counted(self, what: str) -> Callable[..., None]:
        """What takes (done, total) and perhaps the name of what was done last."""

        def shown(done: int, total: int, name: str = "") -> None:
            self._show(what, done, total, f"{done} of {total}", _end(name))

        return shown

    def fetched(self, file: str, done: int, total: int) -> None:
        """A file that is being fetched, in bytes; it goes when it is there."""
        amount = f"{done / 1e6:.3g} of {total / 1e6:.3g} MB"
        self._show(f"fetching {_end(file)}", done, total, amount, "", visible=done < total)

    def _show(
        self, what: str, done: int, total: int, amount: str, last: str, *, visible: bool = True
    ) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, amount="", last="")
        task = self._tasks[what]
        if self._bars.tasks[task].finished and done < total:  # of another model
            self._bars.reset(task, total=total)
        self._bars.update(
            task, completed=done, total=total, amount=amount, last=last, visible=visible
        )


def _end(name: str) -> str:
    """The end of a long name, which tells it from others."""
    name = printable(name)
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
