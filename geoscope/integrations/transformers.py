"""The weights of a run, measured from inside `transformers.Trainer` and the trainers of TRL.

>>> trainer.add_callback(GeoscopeCallback())  # doctest: +SKIP

Adapters are measured in this process, from their factors. Whole models are measured by `geoscope
watch` in a process of its own, from the checkpoints that are saved, so that training does not wait.
Nothing that goes wrong here is raised into the trainer: it is said once, in the log.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from geoscope.errors import OptionError
from geoscope.foreign import INDEX, parsed, small_bytes
from geoscope.integrations.loggers import LOGGERS, Logger, open_logger
from geoscope.sources.memory import LiveAdapter, as_model_or_reference
from geoscope.verbs.adapters.spectra import adapter_ranks
from geoscope.verbs.series.watch import LOG, scalars

__all__ = ["GeoscopeCallback"]

_LOG = logging.getLogger(__name__)
# Seconds between two looks of the process that measures whole models.
_INTERVAL = 5


class GeoscopeCallback(TrainerCallback):
    """Numbers of the weights at every save, or every N steps, into what `report_to` names.

    every: steps between two measurements of an adapter, in place of its saves.
    metrics: ids of whole models that are logged, without their @k; default the columns of
    `compare`. Of adapters it is the ranks and the top share, beside the rank of the factors.
    base: the model that a run of whole models started from; default `model.name_or_path`.
    seconds: bound on the estimated time of a whole model, of which a sample of layers is measured
    then; and on how long the end of training waits for the last checkpoint.

    Keys are geoscope/<metric> and geoscope/layer_<i>/<metric>; the x-axis is the step.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        metrics: Sequence[str] = (),
        base: str | None = None,
        seconds: float = 60.0,
    ) -> None:
        if every is not None and every < 1:
            raise OptionError(f"`every` {every}: a whole number from 1 on is needed")
        self.every, self.metrics, self.base = every, tuple(metrics), base
        self.seconds = seconds
        self._loggers: list[Logger] | None = None
        self._watcher: _Watcher | None = None
        self._said: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        self._try(state, self._begin, args, has.get("model"))

    def on_save(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        if self.every is None:
            self._try(state, self._measure, args, state, has.get("model"))

    def on_step_end(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._try(state, self._measure, args, state, has.get("model"))

    def on_log(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        self._try(state, self._pass_on, args)

    def on_train_end(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        self._try(state, self._end, args)

    def _try(self, state: Any, do: Any, *facts: Any) -> None:
        """On the first process alone; whatever goes wrong is said once."""
        if not state.is_world_process_zero:
            return
        try:
            do(*facts)
        except Exception as error:  # a run must not end because its weights could not be measured
            self._say(f"{type(error).__name__}: {error}" if not str(error) else str(error))

    def _say(self, text: str) -> None:
        if text not in self._said:
            _LOG.warning("geoscope: not measured: %s", text)
        self._said.add(text)

    def _begin(self, args: Any, model: Any) -> None:
        if _is_adapted(model):
            return
        base = self.base or getattr(model, "name_or_path", "")
        if not base:
            raise OptionError(
                "a whole model without a name; give the one it started from as `base`"
            )
        if self.every is not None:
            self._say("`every` is for adapters; whole models are measured when they are saved")
        self._watcher = _Watcher(Path(args.output_dir), base, self.metrics, self.seconds)

    def _measure(self, args: Any, state: Any, model: Any) -> None:
        if self._watcher is not None or not _is_adapted(model):
            return
        live = as_model_or_reference(model, "model")
        assert isinstance(live, LiveAdapter)
        found = adapter_ranks(live.adapter)
        for reason in sorted(set(found.skipped.values())):
            self._say(f"step {state.global_step}: {reason}")
        self._log(args, state.global_step, {"values": found.values, "layers": found.layers})

    def _pass_on(self, args: Any) -> None:
        """Lines that the other process wrote since the last time."""
        for record in () if self._watcher is None else self._watcher.lines():
            if record["status"] == "MEASURED":
                self._log(args, record["step"], record)
            else:
                self._say(f"step {record['step']}: {record['reason']}")

    def _end(self, args: Any) -> None:
        if self._watcher is not None:
            self._watcher.finish(self.seconds)
            self._pass_on(args)
        for logger in self._loggers or ():
            logger.close()
        self._loggers = None

    def _log(self, args: Any, step: int, record: dict[str, Any]) -> None:
        if self._loggers is None:
            self._loggers = _loggers_of(args)
        for logger in self._loggers:
            logger.log(step, scalars(record))


def _is_adapted(model: Any) -> bool:
    peft = sys.modules.get("peft")
    inner = getattr(model, "module", model)
    return peft is not None and isinstance(inner, peft.PeftModel)


def _loggers_of(args: Any) -> list[Logger]:
    """Those of `report_to` that are known here."""
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or ()
    folder = Path(getattr(args, "logging_dir", None) or Path(args.output_dir) / "runs")
    run = str(getattr(args, "run_name", None) or Path(args.output_dir).name)
    return [open_logger(name, folder / "geoscope", run) for name in names if name in LOGGERS]


class _Watcher:
    """`geoscope watch` on the folder of a run, in a process of its own."""

    def __init__(self, run: Path, base: str, metrics: Sequence[str], seconds: float) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.log, self.seen = run / LOG, 0
        self.seen = len(self._read())
        chosen = ("--metrics", ",".join(metrics)) if metrics else ()
        how = ("--budget", f"{seconds:g}", "--interval", str(_INTERVAL), "--jobs", "1")
        words = ("watch", str(run), "--base", base, "--device", "cpu", "--quiet", *how, *chosen)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "geoscope", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self) -> list[dict[str, Any]]:
        """New ones. Raises OptionError where the process ended by itself."""
        found = self._read()
        new, self.seen = found[self.seen :], len(found)
        if not new and self.process.poll() not in (None, -15, 143):
            assert self.process.stderr is not None
            raise OptionError(self.process.stderr.read().strip() or "geoscope watch ended")
        return new

    def _read(self) -> list[dict[str, Any]]:
        try:
            *lines, _ = small_bytes(self.log, INDEX).split(b"\n")  # the last may be in writing
        except OSError:
            return []
        return [parsed(line) for line in lines]

    def finish(self, seconds: float) -> None:
        """Waits as long for the checkpoints that are there, and ends the process."""
        end = time.monotonic() + seconds
        folders = {one.name for one in self.log.parent.glob("checkpoint-*")}
        try:
            while self.process.poll() is None and time.monotonic() < end:
                if folders <= {one["checkpoint"] for one in self._read()}:
                    break
                time.sleep(0.2)
        finally:
            self.process.terminate()
            self.process.wait()
