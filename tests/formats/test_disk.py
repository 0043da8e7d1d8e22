"""Is room asked for all folders of a disk together, before anything is fetched?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from geoscope.errors import CheckpointError
from geoscope.formats.disk import check_room, free_bytes, in_units


@pytest.fixture
def nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return tmp_path


def test_folders_of_one_disk_are_added_up(nearly_full: Path) -> None:
    one, other = nearly_full / "not" / "there yet", nearly_full / "other"
    check_room([{one: 60}, {other: 40}])
    with pytest.raises(CheckpointError) as caught:
        check_room([{one: 60}, {other: 41}])
    assert str(caught.value) == (
        f"101 bytes must be downloaded, but only 100 bytes are free at {one}; free some space, or "
        "set HF_HOME and GEOSCOPE_CACHE to folders on another disk"
    )


def test_nothing_to_fetch_asks_no_disk(nearly_full: Path) -> None:
    check_room([{}, {nearly_full: 0}])
    assert free_bytes([{}, {nearly_full: 0}]) is None
    assert free_bytes([{nearly_full: 1}]) == 100


def test_units() -> None:
    assert [in_units(one) for one in (999, 1000, 1_500_000, 2 * 10**9)] == [
        "999 bytes", "1.00 kB", "1.50 MB", "2.00 GB",
    ]  # fmt: skip
