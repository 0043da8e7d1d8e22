"""One pair of tiny checkpoints for all commands; they are only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.matrices import save_model
from tests.helpers.running import weights, write_pair


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base; tuned and other, two updates of it; small, a fifth as large; same, a copy of it."""
    root = tmp_path_factory.mktemp("models")
    base, tuned = write_pair(root)
    return {
        "base": base,
        "tuned": tuned,
        "other": save_model(root / "other", weights(200)),
        "small": save_model(root / "small", weights(100, rho=0.004)),
        "same": save_model(root / "same", weights()),
    }
