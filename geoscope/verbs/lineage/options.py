"""What may be chosen when a model's origin is sought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from geoscope.verbs.choices import Rename, Select, form, seed_form
from geoscope.verbs.options import Options

__all__ = ["LineageOptions"]


@dataclass(frozen=True, kw_only=True)
class LineageOptions(Rename, Select):
    """Every field is an option of `geoscope lineage`.

    The fields of `Select` and `Rename`, and:
    all_matrices: read every matrix in scope, and embeddings that have to be fetched.
    seed: of the order in which matrices are taken.
    limits: thresholds of the answer, by their names.
    """

    all_matrices: bool = False
    seed: int = field(default=0, metadata=form(seed_form))
    limits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.of_pairs  # which refuses limits that do not exist

    @property
    def of_pairs(self) -> Options:
        """The options by which two models are matched."""
        return Options(
            include=self.include,
            exclude=self.exclude,
            layers=self.layers,
            map_name=self.map_name,
            limits=self.limits,
        )
