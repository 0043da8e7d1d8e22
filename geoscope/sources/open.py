"""How does a reference become an open checkpoint, wherever it lies?"""

from __future__ import annotations

from collections.abc import Callable

from geoscope.models.checkpoint import Checkpoint
from geoscope.sources.local import open_local
from geoscope.sources.reference import LocalReference, parse_reference

__all__ = ["open_checkpoint"]


def open_checkpoint(
    reference: str, *, on_progress: Callable[[str, int, int], None] | None = None
) -> Checkpoint:
    """The checkpoint that `reference` names, from its headers; no tensor data is read.

    `reference` is a folder, a file, `org/name[@revision]` or `hf://org/name[@rev][/sub/folder]`; an
    existing path wins. Downloads report to `on_progress(file, bytes done, bytes in all)`.
    Raises CheckpointError, or OptionError for a reference that is no such thing.
    """
    parsed = parse_reference(reference)
    if isinstance(parsed, LocalReference):
        return open_local(parsed)
    from geoscope.sources.hub.repository import open_hub  # local paths need no huggingface_hub

    return open_hub(parsed, on_progress)
