"""What belongs to an adapter: the files around its folder, or what is in memory with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from geoscope.errors import OptionError
from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapter import Adapter, read_adapter
from geoscope.peft.folder import AdapterFolder, adapter_folder, original_of, record_beside
from geoscope.sources.memory import LiveAdapter, Model, Opened, as_model_or_reference
from geoscope.sources.open import open_checkpoint
from geoscope.verbs.adapters.initialised import Initialised

__all__ = ["AdapterOrigin", "as_adapter", "origin_of", "original_model"]


@dataclass(frozen=True)
class AdapterOrigin:
    """An adapter with what lies beside it.

    given: as the caller named it. layout: `residual`, `mirror` or `anchor`; None if unknown.
    record: geoscope.json, empty without one. folder: None for what is in memory. live: its base
    in memory.
    """

    given: str
    adapter: Adapter
    layout: str | None
    record: Mapping[str, Any]
    folder: AdapterFolder | None = None
    live: Checkpoint | None = None
    made: Initialised | None = None

    @property
    def original(self) -> str | None:
        """Reference of the original model, with its commit, from the record."""
        return original_of(self.record)

    @property
    def resolved(self) -> str:
        """The folder of the adapter, or where it is in memory."""
        return self.adapter.resolved if self.folder is None else str(self.folder.adapter)

    @property
    def has_residual(self) -> bool:
        """Whether the rewritten base is there."""
        if self.folder is not None:
            return self.folder.residual is not None
        return self.made is not None and bool(self.made.residual)

    @property
    def has_anchor(self) -> bool:
        """Whether the frozen second adapter is there."""
        if self.folder is not None:
            return self.folder.anchor is not None
        return self.made is not None and bool(self.made.anchor)

    def residual(self, config: Mapping[str, Any]) -> Checkpoint | None:
        """The rewritten base. config: of the original. Raises CheckpointError."""
        if self.folder is not None:
            path = self.folder.residual
            return None if path is None else open_checkpoint(str(path))
        return None if self.made is None else self.made.opened_residual(config)

    @cached_property
    def anchor(self) -> Adapter | None:
        """The frozen second adapter."""
        if self.folder is not None:
            path = self.folder.anchor
            return None if path is None else read_adapter(path, f"{self.given}/anchor")
        return None if self.made is None else self.made.opened_anchor


def as_adapter(adapter: Model | Initialised, name: str) -> Opened | Initialised:
    """A parameter that names an adapter; nothing is read. Raises OptionError for any other thing.

    name: of the parameter.
    """
    if isinstance(adapter, Initialised):
        return adapter
    if isinstance(adapter, Mapping):
        raise OptionError(
            f"`{name}`: a state dict of an adapter needs its configuration: give "
            "open_adapter(state, config)"
        )
    return as_model_or_reference(adapter, name)


def origin_of(adapter: Model | Initialised, name: str) -> AdapterOrigin:
    """The adapter of a path, of a PEFT model, or in memory.

    Raises OptionError for a model, and as `read_adapter` does.
    """
    found = as_adapter(adapter, name)
    return _of_initialised(found) if isinstance(found, Initialised) else _of_opened(found, name)


def _of_initialised(made: Initialised) -> AdapterOrigin:
    """What `init_adapter` made, in its folder or in memory."""
    if made.out is not None:
        return _of_folder(str(made.out))
    return AdapterOrigin(made.adapter.given, made.adapter, made.layout, made.record, made=made)


def _of_folder(path: str) -> AdapterOrigin:
    folder = adapter_folder(path)
    adapter = read_adapter(folder.adapter, folder.label)
    return AdapterOrigin(folder.given, adapter, folder.layout, folder.record, folder)


def _of_opened(opened: Opened, name: str) -> AdapterOrigin:
    if isinstance(opened, str):
        return _of_folder(opened)
    if isinstance(opened, Checkpoint):
        raise OptionError(f"`{name}` {opened.ref.given}: a model and not an adapter")
    adapter = opened.adapter if isinstance(opened, LiveAdapter) else opened
    if adapter.path is not None:
        return _of_folder(str(adapter.path))
    base = opened.base if isinstance(opened, LiveAdapter) else None
    return AdapterOrigin(adapter.given, adapter, None, {}, live=base)


def original_model(origin: AdapterOrigin, layout: str | None, base: Opened | None) -> Checkpoint:
    """The original model, see `_original`. Raises OptionError for one with an adapter over it."""
    found = _original(origin, layout, base)
    if isinstance(found, str):
        return open_checkpoint(found)
    if isinstance(found, Checkpoint) and not found.is_adapted:
        return found
    raise OptionError("`base`: the original model is needed, without an adapter over it")


def _original(origin: AdapterOrigin, layout: str | None, base: Opened | None) -> Opened:
    """The original model: as given, as recorded, or the adapter's own base where it is that."""
    found: Opened | None = base or origin.original or origin.live
    if found is None and layout != "residual":
        own = origin.adapter.base_reference
        found = original_of(record_beside(own)) or own
    if found is None:
        raise OptionError(
            f"{origin.given}: nothing here tells the original model, which the checks compare "
            "with; give it with `base`"
        )
    return found
