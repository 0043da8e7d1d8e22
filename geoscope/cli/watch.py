"""`geoscope watch`: a line for each checkpoint of a run, as the trainer saves it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.command import option_fields
from geoscope.cli.fail_on import Condition, holding, parse_fail_on
from geoscope.cli.output import Show
from geoscope.digits import number
from geoscope.kinds import KINDS

if TYPE_CHECKING:
    from geoscope.integrations.loggers import Logger
    from geoscope.verbs.series.watch import Observation

from geoscope.verbs.series.watch_options import WatchOptions

__all__ = ["watch"]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that the trainer saves in.")]
_SELECT = ("include", "exclude", "layers", "map_name", "initial_adapter", "lora_alpha")
_COMPUTE = ("limits", "quick", "ks", "device", "dtype", "max_memory", "jobs", "seed")
# Of the line of a step: how a metric is called there, and its digits.
_SHOWN = {"relative_update": "ρ", "update.stable_rank": "stable rank", "spectral_share": "NSS/ρ"}


def watch(
    run: Run,
    *,
    options: Annotated[
        WatchOptions,
        option_fields("every", "only", "seconds", *_SELECT, *_COMPUTE, base=opt.RunBase),
    ],
    once: opt.Once = False,
    until: opt.Until = None,
    interval: opt.Interval = 30.0,
    log: opt.Log = None,
    on_fail: opt.OnFail = None,
    show: Annotated[Show, option_fields("as_json", "quiet", "debug", "fail_on")],
) -> None:
    """A run while it trains, checkpoint by checkpoint."""
    from geoscope.integrations.loggers import open_logger
    from geoscope.verbs.pairs.selection import ids_of
    from geoscope.verbs.series.watch import LOG, scalars
    from geoscope.verbs.series.watch import watch as observe

    kind = "compare" if options.base is not None else "anisotropy"
    conditions = parse_fail_on(
        show.fail_on, kind=kind, codes=KINDS[kind].codes, ids=ids_of(kind, options.pairs)
    )
    output.write_message(f"watching {run}; lines go to {run / LOG}", quiet=show.quiet)
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for name in filter(None, (log or "").split(",")):
            loggers.append(open_logger(name, run / "geoscope", run.resolve().name))
            stack.callback(loggers[-1].close)
        for found in observe(run, options=options, once=once, until=until, interval=interval):
            output.data(json.dumps(found.record, sort_keys=True) if show.as_json else _line(found))
            for logger in loggers:
                logger.log(found.step, scalars(found.record))
            _act(found, conditions, on_fail)


def _line(found: Observation) -> str:
    record = found.record
    head = f"step {record['step']}"
    if record["status"] != "MEASURED":
        return f"{head}: {record['status']}, {record['reason']}"
    values, nulls = record["values"], record["nulls"]
    parts = [
        f"{name} {number(values[key])}" + (f" ({number(nulls[key])})" if key in nulls else "")
        for key, name in _SHOWN.items()
        if key in values
    ]
    if record["verdict"]:
        parts.insert(0, record["verdict"])
    return f"{head}: {' · '.join([*parts, *_changed(record), *_left_out(record)])}"


def _changed(record: Mapping[str, Any]) -> list[str]:
    """How far it went since the checkpoint before, and how many stored entries are others."""
    change, before = record.get("change"), record.get("before")
    if change is None:
        return []
    words = [f"since {before}: ρ {number(change.get('relative_update'))}"]
    same, chance = (of.get("update_sparsity_exact") for of in (change, record["change_nulls"]))
    if same is not None:
        isotropic = "" if chance is None else f" ({_percent(1 - chance)})"
        words.append(f"{_percent(1 - same)}{isotropic} of entries changed")
    if sync := record["changed"]["sync"]:
        even = _percent(sync["break_even"])
        words.append(f"a sync sends {_percent(sync['share'])} of a copy (equal at {even})")
    return [", ".join(words)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _left_out(record: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    if record["missing"]:
        words.append(f"{record['missing']} matrices not compared")
    if "layers_measured" in record:
        words.append(f"layers {','.join(map(str, record['layers_measured']))} alone (--budget)")
    return words


def _act(found: Observation, conditions: Sequence[Condition], command: str | None) -> None:
    """What --fail-on asks for: a command, or the end with 3."""
    met = [] if found.report is None else holding(conditions, found.report)
    if not met:
        return
    output.write_message(f"geoscope: step {found.step}: --fail-on: {', '.join(met)}")
    if command is None:
        raise typer.Exit(3)
    told = {"GEOSCOPE_STEP": str(found.step), "GEOSCOPE_MET": ", ".join(met)}
    done = subprocess.run(command, shell=True, check=False, env={**os.environ, **told})
    if done.returncode:
        output.write_message(f"geoscope: {command} ended with {done.returncode}")
