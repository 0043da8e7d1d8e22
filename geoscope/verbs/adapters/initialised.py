"""What `init_adapter` made: a report, and an adapter in a folder or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from geoscope.models.checkpoint import Checkpoint
from geoscope.outputs.output import MemoryFolder, Output
from geoscope.peft.adapter import Adapter
from geoscope.records import Report
from geoscope.records.card import AdapterCard
from geoscope.sources.memory import adapter_of_tensors, model_of_tensors

__all__ = ["Initialised", "parts_in_memory"]


@dataclass(frozen=True, eq=False)
class Initialised:
    """The report, the adapter, and what its card tells.

    out, readme: the folder that was written and the file of the card, None without one. config:
    adapter_config.json. record: geoscope.json. Without a folder, in memory, by the names of the
    files: tensors of the adapter; residual, the rewritten base of that layout; anchor, the frozen
    second adapter.
    """

    report: Report
    card: AdapterCard = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    record: Mapping[str, Any] = field(repr=False)
    out: Path | None = None
    readme: Path | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    residual: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    anchor: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def layout(self) -> str | None:
        """`residual`, `mirror` or `anchor`; None for a method without one."""
        return self.record["layout"]

    @property
    def adapter(self) -> Adapter:
        """The tensors as an open adapter. Raises OptionError where they were written."""
        return adapter_of_tensors(self.tensors, self.config)

    @property
    def opened_anchor(self) -> Adapter | None:
        """The second adapter, open; None without one."""
        if not self.anchor:
            return None
        return adapter_of_tensors(self.anchor, self.config, label="anchor")

    def opened_residual(self, config: Mapping[str, Any]) -> Checkpoint | None:
        """The rewritten base, open; None without one. config: of the original."""
        return model_of_tensors(self.residual, "residual", config) if self.residual else None


def parts_in_memory(output: Output) -> dict[str, Mapping[str, Tensor]]:
    """The fields of tensors; none of what was written to a folder."""
    if not isinstance(output, MemoryFolder):
        return {}
    return {
        "tensors": output.tensors_in("adapter") or output.tensors_in("."),
        "residual": output.tensors_in("residual"),
        "anchor": output.tensors_in("anchor"),
    }
