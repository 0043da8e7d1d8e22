"""Kept results: found again by content and by what decides the numbers, and by nothing else."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import geoscope.engine.cache as cache_module
from geoscope import Options, Report, compare
from geoscope.engine.cache import ResultCache, code_version, content_of
from geoscope.errors import NumericsError
from geoscope.verbs.options import Interrupted, Progress
from tests.helpers.matrices import gaussian, save_model, updated

Weights = dict[str, Tensor]
NAMES = [
    f"model.layers.{i}.{kind}.weight"
    for i, kind in itertools.product(range(2), ("self_attn.q_proj", "mlp.up_proj"))
]
OPTIONS = Options(ks=(3,), jobs=1)


def weights() -> tuple[Weights, Weights]:
    base, tuned = {}, {}
    for i, name in enumerate(NAMES):
        m, n = (24, 24) if "q_proj" in name else (40, 24)
        whole = gaussian(m, n, seed=i)
        base[name] = whole.float()
        tuned[name] = updated(whole, gaussian(m, n, seed=10 + i), 0.05).float()
    return base, tuned


class Models:
    """A pair of models on disk, and the runs on it."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root, root / "results"
        self.base, self.tuned = weights()
        self.recalled = 0
        self.save()

    def save(self) -> None:
        save_model(self.root / "base", self.base)
        save_model(self.root / "tuned", self.tuned)

    def run(
        self,
        *,
        kind: str = "collapse",
        options: Options = OPTIONS,
        cached: bool = True,
        on_pair: Callable[[int, int, str], None] = lambda *_: None,
    ) -> Report:
        """The report, without what is volatile; `recalled` counts the results from the cache."""
        self.recalled = 0

        def count(recalled: int, _: int) -> None:
            self.recalled = recalled

        chosen = replace(options, cache=self.cache) if cached else options
        progress = Progress(on_pair=on_pair, on_recalled=count)
        report = compare(
            self.root / "base", self.root / "tuned", kind=kind, options=chosen, progress=progress
        )
        return replace(report, provenance=replace(report.provenance, seconds=0.0, argv=()))

    @property
    def files(self) -> list[Path]:
        return [path for path in sorted(self.cache.rglob("*")) if path.is_file()]


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


# --- what is found again ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["collapse", "anisotropy", "alignment", "compare"])
def test_a_report_from_the_cache_equals_the_computed_one(models: Models, kind: str) -> None:
    options = replace(OPTIONS, curves=True, masks=True)
    plain = models.run(kind=kind, options=options, cached=False)
    first = models.run(kind=kind, options=options)
    assert models.recalled == 0
    again = models.run(kind=kind, options=options)
    assert models.recalled == len(NAMES)
    assert first == plain
    assert again == plain
    assert again.dumps() == plain.dumps()


def test_without_a_folder_nothing_is_kept(models: Models) -> None:
    models.run(cached=False)
    assert models.files == []


def test_names_and_places_do_not_matter_only_contents(models: Models, tmp_path: Path) -> None:
    before = models.run()
    for side in ("base", "tuned"):
        moved = {
            key.replace("layers.", "layers.1"): one for key, one in getattr(models, side).items()
        }
        setattr(models, side, moved)
    models.save()
    after = models.run()
    assert models.recalled == len(NAMES)
    assert [one.values for one in after.layers] == [one.values for one in before.layers]
    assert [one.layer for one in after.layers] == [10, 10, 11, 11]


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_one_changed_entry_of_either_tensor_is_computed_anew(models: Models, side: str) -> None:
    before = models.run()
    changed = getattr(models, side)[NAMES[2]]
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(1.0))
    models.save()
    after = models.run()
    assert models.recalled == len(NAMES) - 1
    assert after == models.run(cached=False)
    different = [a.name for a, b in zip(after.layers, before.layers, strict=True) if a != b]
    assert different == [NAMES[2]]


def test_base_and_tuned_are_not_exchanged(models: Models) -> None:
    models.run()
    models.base, models.tuned = models.tuned, models.base
    models.save()
    assert models.run() == models.run(cached=False)


@pytest.mark.parametrize(
    "options",
    [
        replace(OPTIONS, ks=(2,)),
        replace(OPTIONS, solver="exact"),
        replace(OPTIONS, dtype="float32"),
        replace(OPTIONS, curves=True),
        replace(OPTIONS, masks=True),
        replace(OPTIONS, quick=True),
        replace(OPTIONS, seed=1),
    ],
    ids=["ks", "solver", "dtype", "curves", "masks", "quick", "seed"],
)
def test_what_decides_the_numbers_is_part_of_the_key(models: Models, options: Options) -> None:
    models.run()
    report = models.run(options=options)
    assert models.recalled == 0
    assert report == models.run(options=options, cached=False)
    models.run(options=options)
    assert models.recalled == len(NAMES)


def test_each_kind_of_report_has_its_own_results(models: Models) -> None:
    models.run(kind="collapse")
    report = models.run(kind="alignment")
    assert models.recalled == 0
    assert report == models.run(kind="alignment", cached=False)


def test_how_the_work_is_done_is_no_part_of_the_key(models: Models) -> None:
    models.run()
    models.run(options=replace(OPTIONS, jobs=2, max_memory="2GB", exclude=("q_proj",)))
    assert models.recalled == 2


def test_other_code_finds_nothing(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    models.run()
    monkeypatch.setattr(cache_module, "code_version", lambda: "another version")
    models.run()
    assert models.recalled == 0


def test_other_limits_of_the_verdict_are_honoured_on_kept_results(models: Models) -> None:
    first = models.run()
    assert first.summary.verdict is not None
    strict = replace(OPTIONS, limits={"rank_collapse.top_share": 1e-3})
    again = models.run(options=strict)
    assert models.recalled == len(NAMES)
    assert again.summary.verdict is not None
    assert first.summary.verdict.code != "RANK_COLLAPSE"
    assert again.summary.verdict.code == "RANK_COLLAPSE"
    assert again == models.run(options=strict, cached=False)


# --- what is not kept ---------------------------------------------------------------------------


def test_a_matrix_with_nan_is_not_kept_and_found_out_again(models: Models) -> None:
    models.tuned[NAMES[1]][3, 3] = torch.nan
    models.save()
    for recalled in (0, len(NAMES) - 1):
        report = models.run()
        assert models.recalled == recalled
        assert report.coverage.missing == (NAMES[1],)
        assert len(models.files) == len(NAMES) - 1


def test_a_matrix_that_did_not_converge_is_not_kept_and_tried_again(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hopeless(base: Tensor, *_: Any, **__: Any) -> Any:
        raise NumericsError(f"no SVD driver converged on a matrix of {base.shape}")

    with monkeypatch.context() as patch:
        patch.setattr("geoscope.verbs.pairs.matrices.pair_factors", hopeless)
        assert models.run().coverage.missing == tuple(sorted(NAMES))
    assert models.files == []
    assert models.run() == models.run(cached=False)
    assert models.recalled == 0


def test_an_interrupted_run_continues_where_it_stopped(models: Models) -> None:
    def stop_after_two(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        models.run(on_pair=stop_after_two)
    assert caught.value.report is not None
    assert len(caught.value.report.layers) == 2
    again = models.run()
    assert models.recalled >= 2
    assert again == models.run(cached=False)


DAMAGED = {
    "empty": b"",
    "cut off": b'{"row": {"values": {"nss": 0.0',
    "zeros": bytes(100),
    "no text": bytes(range(128, 256)),
    "another document": b"{}",
    "no object": b"[1, 2]",
    "without its parts": b'{"row": null, "method": {}, "curves": {}, "notes": []}',
    "unknown status": b'{"row": {"status": {"nss": "FINE"}}, "curves": {}, "notes": []}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_entry_counts_as_none_and_is_mended(models: Models, content: bytes) -> None:
    plain = models.run()
    damaged = models.files[0]
    before = damaged.read_bytes()
    damaged.write_bytes(content)
    assert models.run() == plain
    assert models.recalled == len(NAMES) - 1
    assert damaged.read_bytes() == before


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_does_not_fail_the_run(models: Models) -> None:
    models.cache.write_text("a file where the folder should be")
    assert models.run() == models.run(cached=False)
    assert models.cache.read_text() == "a file where the folder should be"


def test_a_read_only_folder_does_not_fail_the_run(models: Models) -> None:
    models.cache.mkdir()
    models.cache.chmod(0o555)
    try:
        assert models.run() == models.run(cached=False)
    finally:
        models.cache.chmod(0o755)


def test_a_full_disk_leaves_no_scraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache = ResultCache(tmp_path / "results")
    cache.put("ab" + 62 * "0", {"number": 1})
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == []


def keys(cache: ResultCache, count: int) -> list[str]:
    return [cache.key({"number": i}) for i in range(count)]


def test_clear_removes_every_result_and_counts_them(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "results")
    assert list(cache.files()) == []
    assert cache.clear() == 0
    for i, key in enumerate(keys(cache, 20)):
        cache.put(key, {"number": i})
    assert [cache.get(key) for key in keys(cache, 20)] == [{"number": i} for i in range(20)]
    assert len(list(cache.files())) == 20
    entry = next(cache.files())
    (entry.parent / f".{entry.name}.77-ab.geoscope-part").write_text("by a run that was killed")
    assert len(list(cache.files())) == 20
    assert cache.clear() == 20
    assert list(cache.files()) == []
    assert list((tmp_path / "results").iterdir()) == []
    assert cache.get(keys(cache, 1)[0]) is None
    cache.put(keys(cache, 1)[0], {"number": 0})
    assert cache.get(keys(cache, 1)[0]) == {"number": 0}


PRECIOUS = "thesis.json"


def precious(folder: Path) -> Path:
    """A folder of someone's own, with names of all kinds."""
    (folder / "ab").mkdir(parents=True)
    for name in (PRECIOUS, "ab" * 32 + ".json", "ab/" + PRECIOUS, "ab/" + "cd" * 32 + ".json"):
        (folder / name).write_text(name)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "place", ["", "results", "results/ab", "results/cd/" + "cd" * 32 + ".json"]
)
def test_clear_follows_no_link_and_removes_nothing_of_others(tmp_path: Path, place: str) -> None:
    mine = precious(tmp_path / "mine")
    if "/" in place or not place:
        cache = ResultCache(tmp_path / "cache" / "results")
        for number in range(5):  # a key of content may stand in any folder, and in one of these
            cache.put(f"{number:02x}" * 32, {})
        (cache.folder / "ef").mkdir(exist_ok=True)
        (cache.folder / "ef" / PRECIOUS).write_text("not of a cache")
    link = tmp_path / "cache" / (place or "results/link")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(mine if not place.endswith(".json") else mine / PRECIOUS)
    before = contents(mine)
    assert ResultCache(tmp_path / "cache" / "results").clear() == (5 if place != "results" else 0)
    assert contents(mine) == before
    assert link.is_symlink()
    if place != "results":
        assert (tmp_path / "cache" / "results" / "ef" / PRECIOUS).exists()


def test_one_flipped_bit_anywhere_is_a_miss(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    result = {"row": {"values": {"update.srank": 3.25, "k": 7}, "status": {}}, "notes": ["a"]}
    (key,) = keys(cache, 1)
    cache.put(key, result)
    (entry,) = cache.files()
    content = entry.read_bytes()
    for place in range(len(content)):
        for bit in range(0, 8, 3):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            entry.write_bytes(flipped)
            assert cache.get(key) in (None, result)
    entry.write_bytes(content)
    assert cache.get(key) == result


ODD = [b"[]", b"null", b"3", b'"x"', b'{"result": [], "sha256": 3}', b"[" * 10_000, b"9" * 5000]


@pytest.mark.parametrize("content", ODD)
def test_entries_of_any_type_are_misses(tmp_path: Path, content: bytes) -> None:
    cache = ResultCache(tmp_path)
    (key,) = keys(cache, 1)
    cache.put(key, {"number": 1})
    (entry,) = cache.files()
    entry.write_bytes(content)
    assert cache.get(key) is None


def test_an_entry_under_another_key_or_in_a_pipe_is_a_miss(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    one, other = keys(cache, 2)
    cache.put(one, {"number": 1})
    (entry,) = cache.files()
    moved = cache._path(other)
    moved.parent.mkdir(exist_ok=True)
    entry.rename(moved)
    assert cache.get(other) is None
    os.mkfifo(entry)
    assert cache.get(one) is None


def test_numbers_come_back_to_the_last_digit(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    result = {"values": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 7, None]}
    cache.put("00" * 32, result)
    assert repr(cache.get("00" * 32)) == repr(result)


# --- the parts of the key -----------------------------------------------------------------------

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_content_is_dtype_shape_and_bytes_however_the_tensor_lies_in_memory(
    dtype: torch.dtype,
) -> None:
    weight = gaussian(6, 8, seed=1).to(dtype)
    assert content_of(weight) == content_of(weight.clone())
    assert content_of(weight) == content_of(weight.T.contiguous().T)
    assert content_of(weight) == content_of(torch.stack([weight, weight])[1])
    others = [weight.reshape(8, 6), weight.T, -weight, weight[:5], weight.view(torch.int8)]
    contents = {content_of(one) for one in (weight, *others)}
    assert len(contents) == 1 + len(others)


def test_equal_numbers_in_another_dtype_are_other_contents() -> None:
    weight = gaussian(4, 4, seed=1).bfloat16()
    assert len({content_of(weight.to(dtype)) for dtype in FLOATS}) == len(FLOATS)
    zero = torch.zeros(2, 2)
    assert content_of(zero) != content_of(-zero)


def test_a_key_is_the_same_in_whatever_order_its_parts_come(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    parts: Mapping[str, Any] = {"base": "a", "tuned": "b", "settings": {"ks": (8,), "seed": 0}}
    assert cache.key(parts) == cache.key(dict(reversed(parts.items())))
    assert cache.key(parts) != cache.key({**parts, "tuned": "c"})
    assert cache.key(parts) != cache.key({**parts, "device": "cuda"})


def test_the_code_version_is_that_of_the_modules_that_make_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("linalg/svd.py", "metrics/table.py", "report/text.py", "engine/cache.py"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text("x = 1")
    monkeypatch.setattr(cache_module, "__file__", str(tmp_path / "engine" / "cache.py"))

    def version() -> str:
        return code_version.__wrapped__()

    before = version()
    (tmp_path / "report" / "text.py").write_text("x = 2")
    assert version() == before
    (tmp_path / "linalg" / "svd.py").write_text("x = 2")
    changed = version()
    assert changed != before
    (tmp_path / "metrics" / "table.py").write_text("x = 2")
    assert version() != changed
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert version() not in (before, changed)
