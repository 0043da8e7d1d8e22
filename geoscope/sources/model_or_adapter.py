"""A model or an adapter? Decided on what lies in the folder, here or on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from geoscope.formats.layout import choose_layout
from geoscope.formats.refused import is_adapter_file
from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapter import ADAPTER_CONFIG, Adapter, open_adapter
from geoscope.sources.local import as_chosen, open_local
from geoscope.sources.places import Kind, below, choose_below, find_places
from geoscope.sources.reference import HubReference, LocalReference, parse_reference
from geoscope.sources.shard_folder import open_shards_or_adapter

__all__ = ["adapter_beside", "open_model_or_adapter"]

OnProgress = Callable[[str, int, int], None]


def open_model_or_adapter(
    reference: str,
    *,
    alpha: float | None = None,
    on_progress: OnProgress | None = None,
) -> Checkpoint | Adapter:
    """What `reference` names, from its headers.

    Weights right in the folder are the model, whatever lies beside them. alpha: see `open_adapter`.
    Raises as `open_checkpoint` and `open_adapter` do.
    """
    parsed = parse_reference(reference)
    if not isinstance(parsed, LocalReference):
        return _on_the_hub(parsed, alpha, on_progress)
    path, given = parsed.path, parsed.given
    if not path.is_dir():
        return open_local(parsed)
    places = find_places(path.resolve())
    chosen = choose_below(places)
    folder = path.resolve() / ("" if chosen is None else chosen.folder)
    if chosen is not None and chosen.kind is Kind.ADAPTER:
        return open_adapter(folder, given=below(given, chosen.folder), alpha=alpha)
    if chosen is not None and chosen.kind is Kind.SHARDS:
        found = open_shards_or_adapter(folder, below(given, chosen.folder), alpha=alpha)
        is_adapter = isinstance(found, Adapter)
        return found if is_adapter else as_chosen(found, given, chosen, places)
    return open_local(parsed)


def adapter_beside(model: Checkpoint, *, alpha: float | None = None) -> Adapter | None:
    """The adapter in the folder of a model, as a merge in place leaves both; None without one."""
    folder = Path(model.ref.resolved)
    if not folder.is_dir() or not (folder / ADAPTER_CONFIG).is_file():
        return None
    if not any(is_adapter_file(one.name) for one in folder.iterdir()):
        return None
    found = open_adapter(folder, given=model.ref.given, alpha=alpha)
    note = "a model and an adapter lie in this folder: the adapter is taken"
    return replace(found, beside=note)


def _on_the_hub(
    reference: HubReference, alpha: float | None, on_progress: OnProgress | None
) -> Checkpoint | Adapter:
    from geoscope.sources.hub.repository import (  # local paths need none of it
        hub_folder,
        open_hub_folder,
    )

    folder, commit = hub_folder(reference, on_progress)
    names = folder.names()
    if ADAPTER_CONFIG not in names or choose_layout(names, reference.given) is not None:
        return open_hub_folder(folder, commit, given=reference.given)
    from geoscope.sources.hub.adapter import of_folder, open_fetched

    return open_fetched(of_folder(folder, commit), reference.given, alpha=alpha)
