"""What may be chosen when a series is followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geoscope.arguments import joined, normalise, path_text, texts
from geoscope.errors import OptionError
from geoscope.names import NameMap, Selection, chosen_layers

__all__ = ["FollowOptions"]


@dataclass(frozen=True)
class FollowOptions:
    """Every field is an option of `geoscope trajectory`.

    Paths are strings or `os.PathLike`; one string is one pattern; layers as in `Options`.
    base: the model at step 0; without one the first checkpoint of a series of models is the base.
    initial_adapter: the adapter before training, where that does not start at zero. lora_alpha: in
    place of the one in adapter_config.json. steps: such as "10,20,50", or numbers, one for each
    checkpoint given, in place of those in the names. directions: also the leading pair of every
    update and of every step. scalar_r2: R² of every single entry on a line in t, of "all" entries
    or by the "published" filter; None leaves it out. metrics: a file of metric curves; default is
    trainer_state.json of the last checkpoint. metric: the curve in it; default the only one.
    map_name: REGEX=REPL each, applied to all names before they are matched. jobs: worker threads;
    default one a core.
    """

    base: str | None = None
    initial_adapter: str | None = None
    lora_alpha: float | None = None
    steps: str | None = None
    directions: bool = True
    scalar_r2: str | None = None
    metrics: str | None = None
    metric: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: frozenset[int] | None = None
    map_name: Sequence[str] = ()
    jobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        normalise(
            self,
            **dict.fromkeys(("base", "initial_adapter", "metrics"), path_text),
            **dict.fromkeys(("include", "exclude", "map_name"), texts),
            steps=joined,
            layers=chosen_layers,
        )
        if self.scalar_r2 not in (None, "all", "published"):
            raise OptionError(f"`scalar_r2` {self.scalar_r2!r} is neither all nor published")
        NameMap(self.map_name)  # refuses what is no rule
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(f"`jobs` {self.jobs}: at least one worker is needed")

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude, self.layers)
