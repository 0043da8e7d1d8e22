"""modeldelta: norms, cosine, and all singular values of the update.

Its own loop over two folders, without the report that it writes.

    cd benchmarks && ENVIRONMENT/bin/python -m peers.modeldelta BASE TUNED
"""

from __future__ import annotations

from pathlib import Path

from modeldelta.core.weight_diff import compare_models  # pyright: ignore
from modeldelta.utils.model_loader import get_tensor_map  # pyright: ignore

from peers.folders import report


def compare(base: Path, tuned: Path) -> float:
    """Compares the folders; nothing has to be prepared."""
    found, skipped = compare_models(get_tensor_map(str(base)), get_tensor_map(str(tuned)))
    assert found, "no tensor was compared"
    assert not skipped, f"{skipped} tensors were skipped"
    return 0.0


if __name__ == "__main__":
    report(
        "modeldelta",
        {"compare": compare},
        computes="all singular values of the update (fp32 svdvals; a random sketch above 8192), "
        "effective rank, norms, cosine",
        omits="base and tuned spectra, singular vectors, angles, captured energy, intruders, "
        "nulls, precision floor, error bounds, verdict",
    )
