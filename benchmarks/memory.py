"""Peak memory of `compare`, `trajectory` and `init-adapter` on a pair of models, against promises.

The promises: of compare 4 × the largest pair of matrices counted in fp32, plus 500 MB; of the other
two what --max-memory says, and the same number with `min`, one matrix at a time. With --processes
of compare alone what --dry-run says, of all its processes together.

    python benchmarks/memory.py [--layers 11] [--family qwen2.5-1.5b] [--processes]
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from synthetic import FAMILIES


def _peak(command: list[str]) -> int:
    """Peak resident bytes of a command and of the processes that it starts, seen every 50 ms."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, status = 0, None
    while status is None:
        peak = max(peak, sum(map(_resident, _tree(process.pid))))
        time.sleep(0.05)
        status = process.poll()
    if status:
        sys.exit(f"{command[2]} failed with status {status}")
    return peak


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in path.read_text().split():
                found += _tree(int(child))
    return found


def _resident(pid: int) -> int:
    """Resident bytes; pages that several processes share count for each."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _promised(base: str, tuned: str) -> int:
    """Bytes that `compare --dry-run` tells of."""
    program = (
        "from geoscope import Options; from geoscope.verbs.pairs.prepare import prepare; "
        f"print(prepare({base!r}, {tuned!r}, Options(cache=None)).memory)"
    )
    return int(subprocess.check_output([sys.executable, "-c", program]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--processes", action="store_true", help="compare alone, as --dry-run says")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # In processes of their own: a child's peak counts what its parent held when it forked.
        made = [str(Path(__file__).with_name("synthetic.py")), folder]
        shape = ["--family", given.family, "--layers", str(given.layers)]
        subprocess.run([sys.executable, *made, *shape], check=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        largest = max(math.prod(shape) for shape in FAMILIES[given.family].values())
        least = 4 * 2 * 4 * largest + 500 * 10**6
        over = False
        commands = _commands(folder, least)
        if given.processes:
            words = commands[0][0]
            commands = [(words, _promised(*words[1:3]))]
        for words, bound in commands:
            peak = _peak([sys.executable, "-m", "geoscope", *words, "--no-resume", "-q"])
            over |= peak > bound
            shown = " ".join(words).replace(folder + "/", "")
            figures = f"peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB"
            print(f"{size / 1e9:.2f} GB, {shown}: {figures}", flush=True)
    sys.exit(over)


def _commands(folder: str, least: int) -> list[tuple[list[str], int]]:
    """Words of each command, and its bound in bytes."""
    base, tuned = f"{folder}/base", f"{folder}/tuned"
    series = ["trajectory", tuned, "--base", base, "--steps", "10", "--json"]
    start = ["init-adapter", base, "-r", "16", "-o", f"{folder}/made", "--force", "--json"]
    roomy = 10**9
    return [
        (["compare", base, tuned, "--json"], least),
        ([*series, "-j", "8", "--max-memory", "min"], least),
        ([*series, "-j", "8", "--max-memory", str(roomy)], roomy),
        ([*start, "-j", "8", "--max-memory", "min"], least),
        ([*start, "-j", "8", "--max-memory", str(roomy)], roomy),
    ]


if __name__ == "__main__":
    main()
