"""A model or an adapter? Decided on what lies in the folder, here or on the Hub."""

from __future__ import annotations

from collections.abc import Callable

from geoscope.checkpoints import open_checkpoint
from geoscope.checkpoints.adapter import Adapter, open_adapter
from geoscope.checkpoints.checkpoint import Checkpoint
from geoscope.checkpoints.local import open_local
from geoscope.checkpoints.places import Kind, below, choose_below, find_places
from geoscope.checkpoints.reference import LocalReference, parse_reference
from geoscope.checkpoints.shard_folder import open_shards_or_adapter

__all__ = ["open_model_or_adapter"]


def open_model_or_adapter(
    reference: str,
    *,
    alpha: float | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Checkpoint | Adapter:
    """What `reference` names, from its headers.

    Weights right in the folder are the model, whatever lies beside them. alpha: see `open_adapter`.
    Raises as `open_checkpoint` and `open_adapter` do.
    """
    parsed = parse_reference(reference)
    if not isinstance(parsed, LocalReference):
        return open_checkpoint(reference, on_progress=on_progress)
    path, given = parsed.path, parsed.given
    if not path.is_dir():
        return open_local(parsed)
    chosen = choose_below(find_places(path.resolve()))
    folder = path.resolve() / ("" if chosen is None else chosen.folder)
    if chosen is not None and chosen.kind is Kind.ADAPTER:
        return open_adapter(folder, given=below(given, chosen.folder), alpha=alpha)
    if chosen is not None and chosen.kind is Kind.SHARDS:
        found = open_shards_or_adapter(folder, below(given, chosen.folder))
        if isinstance(found, Adapter):
            return found
    return open_local(parsed)
