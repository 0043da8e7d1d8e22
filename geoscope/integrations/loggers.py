"""Numbers by step into what a run logs to: TensorBoard, Weights & Biases, trackio, MLflow.

A run that is open in this process is used and left open; else one is opened, and closed at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from geoscope.errors import OptionError

__all__ = ["LOGGERS", "Logger", "open_logger"]


class Logger(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, _name: str) -> None:
        _module("tensorboard", "tensorboard")
        writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = writer(log_dir=str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """Its own x-axis, geoscope/step, for a trainer's run counts steps of its own."""

    def __init__(self, _folder: Path, name: str) -> None:
        wandb = _module("wandb", "wandb")
        self.is_own = wandb.run is None
        self.run = wandb.init(project="geoscope", name=name) if self.is_own else wandb.run
        self.run.define_metric("geoscope/step")
        self.run.define_metric("geoscope/*", step_metric="geoscope/step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "geoscope/step": step})

    def close(self) -> None:
        if self.is_own:
            self.run.finish()


class _Trackio:
    def __init__(self, _folder: Path, name: str) -> None:
        self.trackio = _module("trackio", "trackio")
        self.trackio.init(project="geoscope", name=name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()


class _Mlflow:
    """Names of metrics hold no @ there."""

    def __init__(self, _folder: Path, name: str) -> None:
        self.mlflow = _module("mlflow", "mlflow")
        self.is_own = self.mlflow.active_run() is None
        if self.is_own:
            self.mlflow.start_run(run_name=name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        named = {key.replace("@", "_at_"): value for key, value in values.items()}
        self.mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        if self.is_own:
            self.mlflow.end_run()


LOGGERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}


def open_logger(name: str, folder: Path, run: str) -> Logger:
    """The logger of a name. folder: of TensorBoard's files. run: how the others call the run.

    Raises OptionError for another name, or a package that is not installed.
    """
    if name not in LOGGERS:
        raise OptionError(f"logger {name!r} is not one of {', '.join(LOGGERS)}")
    return LOGGERS[name](folder, run)


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise OptionError(
            f"logging needs {package}, which is not installed: pip install {package}"
        ) from None
