"""Peak memory of `geoscope compare` on a sharded pair of 2 GB, against its promise.

The promise: 4 × the largest pair of matrices counted in fp32, plus 500 MB.

    python benchmarks/memory.py [--layers 11] [--family qwen2.5-1.5b]
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from synthetic import FAMILIES


def _peak(command: list[str]) -> int:
    """Peak resident bytes of a command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[2]} failed with status {status}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=11)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # In processes of their own: a child's peak counts what its parent held when it forked.
        made = [str(Path(__file__).with_name("synthetic.py")), folder]
        shape = ["--family", given.family, "--layers", str(given.layers)]
        subprocess.run([sys.executable, *made, *shape], check=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        command = ["compare", f"{folder}/base", f"{folder}/tuned", "--json", "--no-resume", "-q"]
        peak = _peak([sys.executable, "-m", "geoscope", *command])
    largest = max(math.prod(shape) for shape in FAMILIES[given.family].values())
    bound = 4 * 2 * 4 * largest + 500 * 10**6
    print(f"pair of {size / 1e9:.2f} GB: peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
    sys.exit(peak > bound)


if __name__ == "__main__":
    main()
