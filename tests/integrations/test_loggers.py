"""Numbers by step in TensorBoard's files, and what the others are asked for."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from geoscope.errors import OptionError
from geoscope.integrations.loggers import LOGGERS, open_logger

EVENTS = "tensorboard.backend.event_processing.event_accumulator"
VALUES = {"geoscope/nss": 0.25, "geoscope/layer_0/energy_two_sided@8": 0.5}


class Asked:
    """A module of that name, which writes down what it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, **known: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        module = types.ModuleType(name)
        module.__getattr__ = self._make  # type: ignore[method-assign]
        for key, value in known.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)

    def _make(self, name: str) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            self.calls.append((name, positional, named))
            return self if name == "init" else None

        return call

    def __getattr__(self, name: str) -> Any:
        return self._make(name)

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [call[1:] for call in self.calls if call[0] == name]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events: Any = pytest.importorskip(EVENTS)
        logger = open_logger("tensorboard", tmp_path, "run")
        for step in (10, 20):
            logger.log(step, {key: step * value for key, value in VALUES.items()})
        logger.close()
        found = events.EventAccumulator(str(tmp_path))
        found.Reload()
    for key, value in VALUES.items():
        assert [(one.step, one.value) for one in found.Scalars(key)] == [
            (10, 10 * value),
            (20, 20 * value),
        ]


def test_wandb_has_an_axis_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Asked(monkeypatch, "wandb", run=None)
    logger = open_logger("wandb", tmp_path, "grpo")
    logger.log(10, VALUES)
    logger.close()
    assert asked.of("init") == [((), {"project": "geoscope", "name": "grpo"})]
    assert (("geoscope/*",), {"step_metric": "geoscope/step"}) in asked.of("define_metric")
    assert asked.of("log") == [(({**VALUES, "geoscope/step": 10},), {})]
    assert len(asked.of("finish")) == 1


def test_a_run_that_is_open_stays_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = Asked(monkeypatch, "of_the_trainer")
    asked = Asked(monkeypatch, "wandb", run=mine)
    logger = open_logger("wandb", tmp_path, "grpo")
    logger.log(10, VALUES)
    logger.close()
    assert asked.of("init") == [] and len(mine.of("log")) == 1 and mine.of("finish") == []
    flow = Asked(monkeypatch, "mlflow", active_run=lambda: object())
    logger = open_logger("mlflow", tmp_path, "grpo")
    logger.close()
    assert flow.of("start_run") == [] and flow.of("end_run") == []


def test_trackio_and_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Asked(monkeypatch, "trackio")
    logger = open_logger("trackio", tmp_path, "grpo")
    logger.log(10, VALUES)
    logger.close()
    assert asked.of("log") == [((VALUES,), {"step": 10})] and len(asked.of("finish")) == 1
    flow = Asked(monkeypatch, "mlflow")
    logger = open_logger("mlflow", tmp_path, "grpo")
    logger.log(10, VALUES)
    logger.close()
    ((named,), step) = flow.of("log_metrics")[0]
    assert named == {"geoscope/nss": 0.25, "geoscope/layer_0/energy_two_sided_at_8": 0.5}
    assert step == {"step": 10}
    assert flow.of("start_run") == [((), {"run_name": "grpo"})] and len(flow.of("end_run")) == 1


@pytest.mark.parametrize("name", sorted(LOGGERS))
def test_a_package_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=f"pip install {name}"):
        open_logger(name, tmp_path, "run")


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'nonsense' is not one of tensorboard, wandb"):
        open_logger("nonsense", tmp_path, "run")
