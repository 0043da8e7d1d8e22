"""What may be chosen when a run is watched. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from geoscope.arguments import path_text, texts
from geoscope.errors import OptionError
from geoscope.verbs.choices import form
from geoscope.verbs.options import Options

__all__ = ["WatchOptions"]


@dataclass(frozen=True, kw_only=True)
class WatchOptions(Options):
    """The fields of `Options`, whose `budget` is not taken here, and:

    base: the model that the run started from; without one only adapters can be measured, alone.
    every: only steps that are multiples of it.
    only: ids of metrics, without their @k, in place of the columns of `compare`.
    seconds: a bound on the estimated time of a step; a fixed sample of layers is measured then.
    """

    base: str | None = field(default=None, metadata=form(path_text))
    every: int = 1
    only: Sequence[str] = field(default=(), metadata=form(texts))
    seconds: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise OptionError(f"`every` {self.every}: a whole number from 1 on is needed")
        if self.seconds is not None and not self.seconds > 0:
            raise OptionError(f"`seconds` {self.seconds:g}: a number above 0 is needed")

    @property
    def pairs(self) -> Options:
        """The options of a comparison."""
        names = Options.__dataclass_fields__
        return Options(**{name: getattr(self, name) for name in names})
