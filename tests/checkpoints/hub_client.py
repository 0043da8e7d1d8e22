"""Opens a model in a process of its own and prints what came of it as JSON.

huggingface_hub reads its environment when it is imported, so each test of the Hub needs a process.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import Any

from geoscope.checkpoints import Checkpoint, open_checkpoint
from geoscope.errors import GeoscopeError


def main(reference: str, wanted: str, how: str) -> dict[str, Any]:
    """Open `reference`; fetch, or fetch and read, every tensor that `wanted` finds."""
    progress: list[tuple[str, int, int]] = []
    try:
        checkpoint = open_checkpoint(reference, on_progress=lambda *step: progress.append(step))
        found = describe(checkpoint)
        if wanted:
            names = [name for name in checkpoint.tensors if re.search(wanted, name)]
            found["to_fetch"] = checkpoint.bytes_to_fetch(names)
            found["opening"] = list(progress)
            progress.clear()
            checkpoint.fetch(names)
            found["left_to_fetch"] = checkpoint.bytes_to_fetch(names)
            if how == "read":
                found["bits"] = {name: bits(checkpoint, name) for name in names}
    except GeoscopeError as error:
        return {"error": str(error), "kind": type(error).__name__, "progress": progress}
    return {**found, "progress": progress}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "resolved": checkpoint.ref.resolved,
        "commit": checkpoint.ref.commit,
        "dtype": checkpoint.ref.storage_dtype,
        "notes": checkpoint.notes,
        "config": checkpoint.config,
        "tensors": {name: info.source for name, info in checkpoint.tensors.items()},
        "shapes": {name: info.shape for name, info in checkpoint.tensors.items()},
        "torch": "torch" in sys.modules,
    }


def bits(checkpoint: Checkpoint, name: str) -> str:
    import torch

    raw = checkpoint.read(name).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
