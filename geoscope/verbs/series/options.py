"""What may be chosen when a series is followed."""

from __future__ import annotations

from dataclasses import dataclass, field

from geoscope.arguments import joined, path_text
from geoscope.errors import OptionError
from geoscope.trajectory.names import NAMES
from geoscope.verbs.choices import Memory, Nodes, Rename, Resume, Select, Start, form

__all__ = ["FollowOptions", "methods_in_words"]


def methods_in_words() -> str:
    """Every name that `method` of `extrapolate` takes, with its remark."""
    known = [
        name.replace("_", "-") + (f" ({remark})" if remark else "")
        for name, remark in NAMES.items()
    ]
    own = "auto (each matrix its best held-out method)"
    return f"{own}, {', '.join(known)}, damped (of linear), or damped(…) of one."


@dataclass(frozen=True, kw_only=True)
class FollowOptions(Resume, Memory, Nodes, Rename, Select, Start):
    """Every field is an option of `geoscope trajectory`.

    The fields of `Start`, `Select`, `Rename`, `Nodes`, `Memory` and `Resume`, and (paths are
    strings or `os.PathLike`):
    base: the model at step 0; without one the first checkpoint of a series of models is the base.
    steps: such as "10,20,50", or numbers, one for each checkpoint, in place of those in the names.
    directions: also the leading pair of every update and of every step.
    scalar_r2: R² of every single entry on a line in t, of "all" entries or by the "published"
    filter; None leaves it out.
    spectra: also the spectra of every update and how it lies in the base, as `compare` gives them.
    allow_vocab_resize: follow the rows of embeddings and heads that all models have; `extrapolate`
    does not take it.
    metrics: a file of metric curves; default is trainer_state.json of the last checkpoint.
    metric: the curve in it; default the only one.
    """

    base: str | None = field(default=None, metadata=form(path_text))
    steps: str | None = field(default=None, metadata=form(joined))
    directions: bool = True
    scalar_r2: str | None = None
    spectra: bool = False
    allow_vocab_resize: bool = False
    metrics: str | None = field(default=None, metadata=form(path_text))
    metric: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scalar_r2 not in (None, "all", "published"):
            raise OptionError(f"`scalar_r2` {self.scalar_r2!r} is neither all nor published")
