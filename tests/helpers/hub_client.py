"""Opens a model in a process of its own and prints what came of it as JSON.

huggingface_hub reads its environment when it is imported, so each test of the Hub needs a process.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import sys
import time
from types import SimpleNamespace
from typing import Any

from geoscope.errors import GeoscopeError
from geoscope.formats import disk
from geoscope.models.checkpoint import Checkpoint
from geoscope.sources.hub import ranges
from geoscope.sources.open import open_checkpoint


def main(reference: str, wanted: str, how: str) -> dict[str, Any]:
    """Open `reference`; fetch, or fetch and read, every tensor that `wanted` finds.

    how: "fetch", "read", "read alone" (in a copy, without fetching), "parts" (entries 7 … 98),
    "full disk", "no waiting" (how long it would have waited, in place of that).
    """
    waits: list[float] = []
    if how == "full disk":
        usage = shutil.disk_usage("/")._replace(free=5)
        setattr(disk, "shutil", SimpleNamespace(disk_usage=lambda _: usage))  # noqa: B010
    elif how == "no waiting":
        clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
        setattr(ranges, "time", clock)  # noqa: B010
    progress: list[tuple[str, int, int]] = []
    try:
        checkpoint = open_checkpoint(reference, on_progress=lambda *step: progress.append(step))
        found = describe(checkpoint)
        if wanted:
            names = [name for name in checkpoint.tensors if re.search(wanted, name)]
            found["to_fetch"] = checkpoint.bytes_to_fetch(names)
            found["opening"] = list(progress)
            progress.clear()
            if how == "read alone":
                checkpoint = pickle.loads(pickle.dumps(checkpoint))  # as workers get it
            else:
                checkpoint.fetch(names)
            found["left_to_fetch"] = checkpoint.bytes_to_fetch(names)
            if how.startswith("read"):
                found["bits"] = {name: bits(checkpoint.read(name)) for name in names}
            elif how == "parts":
                parts = {name: checkpoint.read_part(name, 7, 99) for name in names}
                found["bits"] = {name: bits(one) for name, one in parts.items()}
    except GeoscopeError as error:
        return {
            "error": str(error),
            "kind": type(error).__name__,
            "progress": progress,
            "waits": waits,
        }
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


def bits(tensor: Any) -> str:
    import torch

    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
