"""The leading pairs of a series as a file: what H and the report do not hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from geoscope.formats.safetensors_writer import FilePlan, TensorPlan, write_tensors
from geoscope.trajectory.rank1 import Rank1Path, align_signs
from geoscope.verbs.series.report import Trajectory

__all__ = ["write_vectors"]


def write_vectors(path: Path, made: Trajectory, steps: Sequence[float]) -> None:
    """NAME.updates.u (T, m), .v (T, n) and .sigma (T,) of Δ_1 … Δ_T, and NAME.steps.… of δ, fp64.

    Signs are aligned from the last step to the first. Metadata: `steps`, the T + 1 steps as JSON.
    Raises CheckpointError for a file that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for kind, paths in (("updates", made.paths), ("steps", made.local)):
        for name, one in _aligned(paths).items():
            tensors |= {f"{name}.{kind}.{key}": row for key, row in one.items()}
    tensors = dict(sorted(tensors.items()))
    plan = FilePlan(
        {name: TensorPlan.of(one) for name, one in tensors.items()},
        {"steps": json.dumps(list(steps))},
    )
    with write_tensors(path, plan) as writer:
        for name in plan.order:
            writer.write(name, tensors[name])


def _aligned(paths: Mapping[str, Rank1Path]) -> dict[str, dict[str, Tensor]]:
    found = {name: align_signs(path)[0] for name, path in paths.items()}
    return {name: {"u": one.u, "v": one.v, "sigma": one.sigma} for name, one in found.items()}
