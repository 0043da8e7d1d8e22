"""What is known of tensors and models from headers alone, and what corresponds to what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from geoscope.records.codec import not_in_json

__all__ = [
    "CODES",
    "IN_MEMORY",
    "NOT_READ",
    "ModelRef",
    "Pairing",
    "Quantisation",
    "Rename",
    "ShapeMismatch",
    "Skipped",
    "TensorInfo",
    "WeightPair",
]

# In place of the storage dtype of a model that is named and not looked at.
NOT_READ = "(base not read)"
# Head of what is resolved to tensors of this process.
IN_MEMORY = "in memory: "

# Storage as codes, which are read with their scales as fp32.
CODES = frozenset({"float8_e4m3fn", "mxfp4", "nf4", "fp4"})


class Quantisation(NamedTuple):
    """What storing a weight as codes and scales does to it.

    name: of the format. error: about ‖rounding error‖/‖W‖ of a Gaussian W. fraction_bits: of its
    numbers, about. size: Frobenius norm of what storing this weight rounded away.
    """

    name: str
    error: float
    fraction_bits: int
    size: float = 0.0


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, from the header alone.

    `shape` is (out, in) after the turns of the reading boundary; `transposed` says that the file
    holds it as (in, out) (Conv1D). `dtype` is the storage dtype, spelled as torch does
    (`bfloat16`), or names the codes of a quantised weight (CODES), and `nbytes` counts it.
    `source` names the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    source: str
    transposed: bool = False

    @property
    def memory_bytes(self) -> int:
        """Bytes once it is read: codes become fp32."""
        return 4 * math.prod(self.shape) if self.dtype in CODES else self.nbytes


@dataclass(frozen=True)
class WeightPair:
    """A base tensor and the tuned tensor that corresponds to it."""

    name: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    base: TensorInfo
    tuned: TensorInfo


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not compared, and why.

    `missing` tells the two kinds apart: True for a matrix in scope that should have been compared
    (it makes the coverage PARTIAL), False for what is fine to leave out.
    """

    name: str
    reason: str
    missing: bool = not_in_json(False)


@dataclass(frozen=True)
class ShapeMismatch:
    """Two tensors of one name and different shapes."""

    name: str
    base: tuple[int, ...]
    tuned: tuple[int, ...]


@dataclass(frozen=True)
class Rename:
    """A tuned name that was matched to a base name through its canonical form."""

    base: str
    tuned: str
    rule: str


@dataclass(frozen=True)
class Pairing:
    """What corresponds to what, and everything that does not. Made from headers alone.

    `matrices` are the 2-D weights in scope; `vectors` the norms and biases (norm of change and
    changed fraction only). `base_only`, `tuned_only` and `shape_mismatch` list every tensor of
    those kinds; `missing` holds the names among them that are matrices in scope.
    """

    matrices: tuple[WeightPair, ...]
    vectors: tuple[WeightPair, ...]
    base_only: tuple[str, ...]
    tuned_only: tuple[str, ...]
    shape_mismatch: tuple[ShapeMismatch, ...]
    skipped: tuple[Skipped, ...]
    renamed: tuple[Rename, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class ModelRef:
    """A model as it was given and as it was resolved.

    storage_dtype: of most weights; NOT_READ for a base that is not looked at.
    """

    given: str
    resolved: str
    commit: str | None
    storage_dtype: str

    @classmethod
    def not_read(cls, name: str | None) -> ModelRef:
        """A base that an adapter names, if it does, and that is not looked at."""
        return cls(name or NOT_READ, NOT_READ, None, NOT_READ)

    @property
    def is_in_memory(self) -> bool:
        """Whether it is of tensors in the caller's process."""
        return self.resolved.startswith(IN_MEMORY)

    @property
    def tail(self) -> str:
        """The last two parts of a path or Hub id: enough to tell models apart."""
        parts = [part for part in self.given.replace("\\", "/").split("/") if part not in ("", ".")]
        return "/".join(parts[-2:]) or self.given

    @property
    def is_read(self) -> bool:
        """Whether its weights were looked at; the base of an adapter alone is only named."""
        return self.storage_dtype != NOT_READ
