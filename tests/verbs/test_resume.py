"""A run that was stopped goes on: what was finished is recalled, and gives the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geoscope import FollowOptions, InitOptions, Report, follow
from geoscope.engine.cache import packed, unpacked
from geoscope.errors import Stopped
from geoscope.verbs.adapters.initialise import initialise
from geoscope.verbs.options import Progress
from tests.helpers.matrices import gaussian, save_model
from tests.helpers.running import weights

STEPS = (10, 20, 30)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base and a run of three checkpoints, four matrices each."""
    base = weights()
    save_model(tmp_path / "base", base)
    for step in STEPS:
        tuned = {
            name: W if W.dim() == 1 else W + gaussian(*W.shape, seed=step, sd=1e-4 * step).float()
            for name, W in base.items()
        }
        save_model(tmp_path / "run" / f"checkpoint-{step}", tuned)
    return tmp_path


def stop_after(count: int) -> Callable[[int, int, str], None]:
    def stop(done: int, _total: int, _name: str) -> None:
        if done == count:
            raise Stopped(signal.SIGINT)

    return stop


def followed(
    root: Path, *, cache: bool = True, on_pair: Callable[[int, int, str], None] | None = None
) -> tuple[str, int]:
    """The report without what is volatile, and how many results were recalled."""
    recalled: list[int] = []
    progress = Progress(on_recalled=lambda count, _total: recalled.append(count))
    if on_pair is not None:
        progress = replace(progress, on_pair=on_pair)
    options = FollowOptions(
        base=str(root / "base"), jobs=1, scalar_r2="all", cache=root / "kept" if cache else None
    )
    report: Report = follow(str(root / "run"), options=options, progress=progress)
    made = replace(report.provenance, argv=(), seconds=0.0)
    return replace(report, provenance=made).dumps(), sum(recalled)


def test_a_series_that_was_stopped_goes_on(run: Path) -> None:
    with pytest.raises(Stopped):
        followed(run, on_pair=stop_after(2))
    report, recalled = followed(run)
    assert 2 <= recalled < 4
    assert report == followed(run, cache=False)[0]
    assert followed(run) == (report, 4)


def test_a_changed_weight_of_any_step_is_measured_anew(run: Path) -> None:
    before, _ = followed(run)
    path = run / "run" / "checkpoint-20" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    after, recalled = followed(run)
    assert recalled == 3
    assert after != before
    assert after == followed(run, cache=False)[0]


def test_a_damaged_entry_is_measured_anew(run: Path) -> None:
    before, _ = followed(run)
    for path in (run / "kept").rglob("*.json"):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    assert followed(run) == (before, 0)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those that name the folder itself."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "geoscope.json", "adapter_config.json")
    }


def made(root: Path, out: str, *, cache: bool = True, stop: int = 0) -> int:
    recalled: list[int] = []
    progress = Progress(on_recalled=lambda count, _total: recalled.append(count))
    if stop:
        progress = replace(progress, on_pair=stop_after(stop))
    options = InitOptions(rank=2, jobs=1, cache=root / "kept" if cache else None)
    initialise(root / "base", root / out, options, progress=progress)
    return sum(recalled)


def test_an_adapter_that_was_stopped_goes_on(run: Path) -> None:
    with pytest.raises(Stopped):
        made(run, "first", stop=2)
    assert not (run / "first").exists()
    assert 2 <= made(run, "first") < 4
    assert made(run, "alone", cache=False) == 0
    assert content(run / "first") == content(run / "alone")
    assert made(run, "again") == 4
    assert content(run / "again") == content(run / "alone")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_a_tensor_is_kept_to_the_last_bit(dtype: torch.dtype) -> None:
    for shape in ((3, 4), (0, 4), ()):
        tensor = (1e3 * torch.rand(shape, dtype=torch.float64)).to(dtype)
        back = unpacked(packed(tensor))
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
    assert unpacked(packed(None)) is None


@pytest.mark.slow
def test_two_processes_on_one_output_and_one_cache_do_not_mix(run: Path) -> None:
    """Of ranks 2 and 3 into one folder one is whole, whichever it is; the other says why not."""
    made(run, "2", cache=False)
    words = [sys.executable, "-m", "geoscope", "init-adapter", str(run / "base"), "-q"]
    alone = {2: content(run / "2")}
    subprocess.run([*words, "-r", "3", "-o", str(run / "3"), "--no-resume"], check=True)
    alone[3] = content(run / "3")
    environment = {**os.environ, "GEOSCOPE_CACHE": str(run / "kept")}
    both = [
        subprocess.Popen(
            [*words, "-r", str(rank), "-o", str(run / "out")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (2, 3)
    ]
    said = [each.communicate()[1] for each in both]
    codes = [each.returncode for each in both]
    assert sorted(codes) == [0, 1], said
    assert "another run writes it" in said[codes.index(1)] or "not empty" in said[codes.index(1)]
    assert content(run / "out") == alone[2 + codes.index(0)]
