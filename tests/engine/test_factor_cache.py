"""Are kept factors the same bits, found by content alone, and bounded in size?"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import geoscope
from geoscope.engine.factor_cache import FactorCache
from geoscope.errors import OptionError
from geoscope.folders import kept_at_most
from geoscope.linalg import Factors, Operand, factorise
from geoscope.metrics import factorising
from geoscope.metrics import kept as kept_module
from geoscope.verbs.options import Options
from geoscope.verbs.pairs import matrices
from tests.helpers.matrices import gaussian, save_model, updated

OPTIONS = Options(ks=(4,), jobs=1)


def factors(seed: int = 0, vectors: int = 4) -> Factors:
    return factorise(Operand(gaussian(40, 30, seed=seed)[None]), vectors=vectors, cuts=(2, 4))


def same(one: Factors | None, other: Factors) -> bool:
    assert one is not None
    pairs = zip((one.S, one.U, one.Vh), (other.S, other.U, other.Vh), strict=True)
    alike = [a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs]
    return all(alike) and one.methods == other.methods


@pytest.mark.parametrize("vectors", [0, 4])
def test_what_is_kept_is_found_bit_by_bit(tmp_path: Path, vectors: int) -> None:
    cache, made = FactorCache(tmp_path), factors(vectors=vectors)
    cache.put({"content": "a"}, made)
    found = cache.get({"content": "a"})
    assert found is not None
    assert same(found, made)
    if vectors:
        assert found.U is not None and made.U is not None
        assert found.U.stride()[1:] == made.U.stride()[1:]
    assert cache.get({"content": "b"}) is None


def test_a_changed_moved_or_cut_entry_is_not_there(tmp_path: Path) -> None:
    cache = FactorCache(tmp_path)
    for name in ("a", "b"):
        cache.put({"content": name}, factors())
    first, second = cache.files()
    whole = first.read_bytes()
    for damage in (whole[:-8], whole[:100], b"", whole[:200] + b"\0" + whole[201:]):
        first.write_bytes(damage)
        assert sum(cache.get({"content": name}) is not None for name in ("a", "b")) == 1
    first.write_bytes(second.read_bytes())
    assert sum(cache.get({"content": name}) is not None for name in ("a", "b")) == 1


def test_the_oldest_go_first_and_use_makes_an_entry_new(tmp_path: Path) -> None:
    probe = FactorCache(tmp_path / "probe")
    probe.put({"n": 0}, factors())
    (entry,) = probe.files()
    cache = FactorCache(tmp_path / "kept", limit=int(4.5 * entry.stat().st_size))
    for number in range(4):
        cache.put({"n": number}, factors(number))
        path = next(path for path in cache.files() if path.stat().st_mtime > 10**6)
        os.utime(path, (number + 1, number + 1))
    assert same(cache.get({"n": 0}), factors(0))
    cache.put({"n": 4}, factors(4))
    there = [cache.get({"n": number}) is not None for number in range(5)]
    assert there == [True, False, True, True, True]
    assert sum(path.stat().st_size for path in cache.files()) <= 4.5 * entry.stat().st_size
    assert cache.clear() == 4
    assert not (tmp_path / "kept").exists()


def test_the_bound_is_a_share_of_the_disk_or_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < kept_at_most(tmp_path / "nothing" / "here", 0) < 1 << 50
    monkeypatch.setenv("GEOSCOPE_CACHE_SIZE", "3GB")
    assert kept_at_most(tmp_path, 0) == 3 * 10**9
    monkeypatch.setenv("GEOSCOPE_CACHE_SIZE", "much")
    with pytest.raises(OptionError, match="GEOSCOPE_CACHE_SIZE"):
        kept_at_most(tmp_path, 0)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(matrices, "_LEAST_SIDE", 8)
    base = {f"model.layers.0.mlp.{n}.weight": gaussian(48, 40, seed=i) for i, n in enumerate("ab")}
    models = [base]
    for run in range(3):
        changed = {k: updated(w, gaussian(48, 40, seed=9 + run), 0.1) for k, w in base.items()}
        models.append(changed)
    return [
        str(save_model(tmp_path / str(i), {k: w.float() for k, w in model.items()}))
        for i, model in enumerate(models)
    ]


def told(*folders: str, options: Options = OPTIONS, **how: Any) -> str:
    report = geoscope.compare(*folders, options=options, **how)
    return re.sub(r'"seconds": ?[^,}]*', "", report.dumps())


@pytest.mark.parametrize("change", [{}, {"quick": True}, {"solver": "exact"}, {"curves": True}])
def test_a_base_is_factorised_once_and_numbers_stay(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """For several tuned models, an anchor, and across runs; of updates, for their overlaps."""
    options = replace(OPTIONS, **change)
    made: list[object] = []
    for_overlaps: list[object] = []
    whole, leading = factorising.factorised, kept_module.factorise

    def counted(*given: Any, **named: Any) -> Any:
        made.append(given)
        return whole(*given, **named)

    def counted_too(*given: Any, **named: Any) -> Any:
        for_overlaps.append(given)
        return leading(*given, **named)

    base, *tuned = folders
    how = {"kind": "collapse", "anchor": tuned[1]}
    without = told(*folders, options=options), told(base, tuned[0], options=options, **how)
    monkeypatch.setattr(factorising, "factorised", counted)
    monkeypatch.setattr(kept_module, "factorise", counted_too)
    kept = replace(options, cache=tmp_path / "cache")
    assert told(*folders, options=kept) == without[0]
    # what is not by Gram matrices keeps no update
    updates = 2 * 3 if {"quick", "solver"} & {*change} else 0
    assert len(made) == 2 + updates
    assert len(for_overlaps) == 2 * 3  # each update once, for its values and its three overlaps
    made.clear()
    anchored = replace(kept, cache=tmp_path / "another")
    assert told(base, tuned[0], options=anchored, **how) == without[1]
    assert len(made) == 2 + 2 * 2  # two updates without overlaps
