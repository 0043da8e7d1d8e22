"""What more than one verb lets its caller choose: the fields that their options share.

Loads no torch: the command line makes its options from these fields, and help must not wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from geoscope.arguments import path_of, path_text, scalar, size, texts
from geoscope.errors import OptionError
from geoscope.names import NameMap, Selection, chosen_layers

if TYPE_CHECKING:
    from geoscope.peft.adapter import Adapter

__all__ = [
    "Compute", "Memory", "Nodes", "Rename", "Resume", "Select", "Start", "chosen", "form",
    "seed_form",
]  # fmt: skip

_MOST_WORKERS = 1024  # a thread each
# Options that say how fast the numbers come, and what is of one machine alone.
_LOCAL = ("jobs", "max_memory", "cache", "device", "force", "ray")


def form(rule: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Metadata of a field: its value is `rule(value, name)`, but for a default None."""
    return {"form": rule}


def _plain(annotation: Any) -> Callable[[Any, str], Any] | None:
    """The rule of a field that holds a number, a text or a switch; None for any other."""
    kind = str(annotation).removesuffix(" | None")
    if kind not in ("bool", "int", "float", "str"):
        return None
    return lambda value, name: scalar(value, name, kind)


class _Choices:
    """Puts every field in its one form when an object is made. Raises OptionError."""

    def __post_init__(self) -> None:
        for each in fields(self):  # pyright: ignore[reportArgumentType]
            value, rule = getattr(self, each.name), each.metadata.get("form") or _plain(each.type)
            if rule is not None and not (value is None and each.default is None):
                object.__setattr__(self, each.name, rule(value, each.name))


Chosen = TypeVar("Chosen", bound=_Choices)


def chosen(kind: type[Chosen], options: Chosen | None, named: Mapping[str, Any]) -> Chosen:
    """The options, with those that were named in the call in their place.

    Raises OptionError for a name that is none of them.
    """
    known = [each.name for each in fields(kind)]  # pyright: ignore[reportArgumentType]
    for name in named:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; is {near[0]} meant?" if near else f"; they are {', '.join(known)}"
            raise OptionError(f"{name!r} is not an option of this function{hint}")
    if not isinstance(options, kind | None):
        raise OptionError(f"options: {kind.__name__} is needed, not {type(options).__name__}")
    made = kind() if options is None else options
    return replace(made, **named)  # pyright: ignore[reportArgumentType]


def _rules(value: Any, _name: str) -> Sequence[str]:
    return NameMap(value or ()).given


def _workers(value: Any, name: str) -> int:
    value = scalar(value, name, "int")
    if value < 1:
        raise OptionError(f"`{name}` {value}: at least one worker is needed")
    if value > _MOST_WORKERS:
        raise OptionError(f"`{name}` {value}: at most {_MOST_WORKERS} workers; write one a core")
    return value


def _above_zero(value: Any, name: str) -> float:
    value = scalar(value, name, "float")
    if not 0 < value < math.inf:
        raise OptionError(f"`{name}` {value}: a number above 0 is needed")
    return value


def seed_form(value: Any, name: str) -> int:
    """A seed as numpy and torch take it."""
    value = scalar(value, name, "int")
    if not 0 <= value < 2**63:
        raise OptionError(f"`{name}` {value}: a whole number from 0 to 2^63 - 1 is needed")
    return value


@dataclass(frozen=True, kw_only=True)
class Select(_Choices):
    """Which tensors are looked at.

    include, exclude: patterns (`re.search`); one string is one.
    layers: block indices, a number or "0-3,7" too.
    """

    include: Sequence[str] = field(default=(), metadata=form(texts))
    exclude: Sequence[str] = field(default=(), metadata=form(texts))
    layers: frozenset[int] | None = field(default=None, metadata=form(chosen_layers))

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude, self.layers)


@dataclass(frozen=True, kw_only=True)
class Rename(_Choices):
    """How names are changed before they are matched.

    map_name: REGEX=REPL each, applied to the names of all models; one string is one.
    """

    map_name: Sequence[str] = field(default=(), metadata=form(_rules))


def _adapter(value: Any, name: str) -> str | Adapter:
    if not hasattr(value, "modules") and not isinstance(value, Mapping):  # nor is it of torch
        return path_text(value, name)
    from geoscope.sources.memory import as_adapter_or_reference

    return as_adapter_or_reference(value, name)


@dataclass(frozen=True, kw_only=True)
class Start(_Choices):
    """Where adapters started.

    initial_adapter: the adapter before training, where that does not start at zero; a path, a PEFT
    model, or what `open_adapter` made of a state dict.
    lora_alpha: in place of the one in adapter_config.json.
    """

    initial_adapter: str | Adapter | None = field(default=None, metadata=form(_adapter))
    lora_alpha: float | None = field(default=None, metadata=form(_above_zero))

    @property
    def start_name(self) -> str | None:
        """What reports call the initial adapter."""
        start = self.initial_adapter
        return start if start is None or isinstance(start, str) else start.given


@dataclass(frozen=True, kw_only=True)
class Compute(_Choices):
    """How it is computed.

    jobs: worker threads on the CPU; default one a core.
    seed: of all random draws.
    """

    jobs: int | None = field(default=None, metadata=form(_workers))
    seed: int = field(default=0, metadata=form(seed_form))


@dataclass(frozen=True, kw_only=True)
class Resume(_Choices):
    """Where finished matrices are kept.

    cache: folder in which results are kept and found again; None keeps nothing.
    """

    cache: Path | None = field(default=None, metadata=form(path_of))


@dataclass(frozen=True, kw_only=True)
class Memory(_Choices):
    """How much memory the process may take.

    max_memory: such as `8GB`, bytes, or `min` for the least that works.
    """

    max_memory: str | None = field(default=None, metadata=form(size))


@dataclass(frozen=True, kw_only=True)
class Nodes(Compute):
    """The fields of `Compute`, and on which machines it is computed.

    ray: address of a Ray cluster that computes, `auto` or `local`; None for this process.
    """

    ray: str | None = None

    @property
    def device_asked(self) -> str:
        """The device that was chosen, where one can be."""
        return str(getattr(self, "device", "cpu"))

    @property
    def deciding(self) -> dict[str, Any]:
        """Options that decide the numbers, and not how fast they come, as JSON has them."""
        named = [each.name for each in fields(self) if each.name not in _LOCAL]
        every = {name: _listed(getattr(self, name)) for name in named}
        if isinstance(self, Start):
            every["initial_adapter"] = self.start_name
        return every


def _listed(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
