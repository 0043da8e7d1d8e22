"""Were the factors of an adapter gathered from all ranks? Mostly zero rows say they were not."""

from __future__ import annotations

from torch import Tensor

from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapted import AdaptedCheckpoint
from geoscope.peft.lora import LoraModule

__all__ = ["cut_factors"]

# Share of rows that are exactly zero, above which a factor is named. Training moves every row of a
# factor that has a gradient; a shard that stayed away leaves its rows as they were made.
_MOST = 0.5


def cut_factors(tuned: Checkpoint) -> str | None:
    """A remark on factors of which most rows, and not all, are exactly zero; None without any.

    Reads the factors of every module.
    """
    if not isinstance(tuned, AdaptedCheckpoint):
        return None
    adapter = tuned.adapter
    cut: list[tuple[str, int, int]] = []
    for module in adapter.modules.values():
        if not isinstance(module, LoraModule):
            continue
        for info in (module.A, module.B):
            zero, rows = _zero_rows(adapter.read(info.name))
            if _MOST * rows < zero < rows:
                cut.append((info.name, zero, rows))
    if not cut:
        return None
    name, zero, rows = cut[0]
    return (
        f"{adapter.given}: most rows of {len(cut)} factors are exactly zero, first {zero} of "
        f"{rows} rows of {name}: a save in which not all shards were gathered? Gather them and "
        "save again"
    )


def _zero_rows(factor: Tensor) -> tuple[int, int]:
    rows = (factor == 0).flatten(1).all(1)
    return int(rows.sum()), len(rows)
