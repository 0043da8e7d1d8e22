"""What tests of commands sample from equal spectra is sampled once, for all workers of pytest.

`tuned_spectra` and `mean_angles` depend on their arguments alone, and tiny models of the same seeds
come again in hundreds of tests. Tests of these functions, of stacks and of workers, and all below
`linalg/`, `metrics/` and `engine/` call them as they are. So it is with the speed of the machine,
which dry runs measure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

__all__ = ["sample_once"]

_KEPT: dict[Any, Any] = {}
_MOST = 1 << 14  # numbers of a result that is kept


def sample_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """For one test: the commands take what was sampled from the same numbers before.

    folder: where workers leave it for one another.
    """
    for module, name in (
        ("providers", "tuned_spectra"),
        ("providers", "mean_angles"),
        ("measure", "mean_angles"),
    ):
        place = import_module(f"geoscope.metrics.{module}")
        monkeypatch.setattr(place, name, _once(getattr(place, name), folder))
    monkeypatch.setattr("geoscope.verbs.pairs.prepare.slowness", _slowness)


@cache
def _slowness(workers: int) -> float:
    from geoscope.engine.speed import slowness  # conftest.py is not to import torch

    return slowness(workers)


def _once(sample: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    @wraps(sample)
    def sampled(*arguments: Any, **settings: Any) -> Any:
        key = (sample.__name__, *map(_bits, arguments), *sorted(settings.items()))
        if key not in _KEPT:
            path = folder / hashlib.sha256(repr(key).encode()).hexdigest()
            result = _read(path) if path.exists() else sample(*arguments, **settings)
            if _numbers(result) > _MOST:
                return result
            _KEPT[key] = _copy(result)
            if not path.exists():
                _write(result, path)
        return _copy(_KEPT[key])

    return sampled


def _read(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def _write(result: Any, path: Path) -> None:
    import torch

    unfinished = path.with_suffix(f".{uuid4().hex}")  # other threads write, too
    torch.save(result, unfinished)
    unfinished.rename(path)


def _bits(argument: Any) -> Any:
    """The argument to the last bit."""
    if hasattr(argument, "numpy"):
        return argument.shape, argument.dtype, argument.contiguous().numpy().tobytes()
    return argument


def _copy(result: Any) -> Any:
    return tuple(map(_copy, result)) if isinstance(result, tuple) else result.clone()


def _numbers(result: Any) -> int:
    return sum(map(_numbers, result)) if isinstance(result, tuple) else result.numel()
