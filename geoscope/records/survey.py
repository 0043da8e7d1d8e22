"""What headers alone tell: the noun behind `inspect` and `--dry-run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geoscope.records.codec import encode
from geoscope.records.tensors import Pairing, TensorInfo

__all__ = ["Survey"]

SURVEY_SCHEMA = "geoscope.inspect/1"


@dataclass(frozen=True)
class Survey:
    """Headers of one model, or of a pair, and what comparing them would take.

    models: {"given", "resolved", "commit", "storage_dtype", "tensors", "parameters", "bytes",
    "model_type"} of each. bytes_to_fetch is for the Hub, 0 for local folders; free_disk are the
    free bytes where they go, None where nothing is to be fetched. tasks: into how many a Ray
    cluster takes the work, 0 for one machine; memory, workers and seconds are of the largest then.
    """

    models: tuple[Mapping[str, Any], ...]
    pairing: Pairing
    notes: tuple[str, ...]
    bytes_to_fetch: int
    free_disk: int | None
    memory: int
    workers: int
    device: str
    seconds: float
    tasks: int = 0

    @property
    def paired(self) -> bool:
        """Whether two different models are looked at."""
        return len(self.models) > 1

    def dumps(self) -> str:
        """The survey as strict JSON, keys sorted."""
        pairing = self.pairing
        document = {
            "schema": SURVEY_SCHEMA,
            "models": [dict(model) for model in self.models],
            "matrices": [
                _tensor(matrix.base, matrix.layer, matrix.module) for matrix in pairing.matrices
            ],
            "vectors": [
                _tensor(vector.base, vector.layer, vector.module) for vector in pairing.vectors
            ],
            "base_only": list(pairing.base_only),
            "tuned_only": list(pairing.tuned_only),
            "shape_mismatch": [encode(item) for item in pairing.shape_mismatch],
            "skipped": [encode(item) for item in pairing.skipped],
            "renamed": [encode(item) for item in pairing.renamed],
            "missing": list(pairing.missing),
            "notes": list(self.notes),
            "plan": {
                "bytes_to_fetch": self.bytes_to_fetch,
                "free_disk": self.free_disk,
                "memory": self.memory,
                "workers": self.workers,
                "device": self.device,
                "seconds": self.seconds,
                "tasks": self.tasks,
            },
        }
        return json.dumps(document, sort_keys=True, allow_nan=False, ensure_ascii=False)


def _tensor(info: TensorInfo, layer: int | None, module: str) -> dict[str, Any]:
    return {
        "name": info.name,
        "layer": layer,
        "module": module,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "transposed": info.transposed,
        "source": info.source,
    }
