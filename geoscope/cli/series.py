"""Commands on a series of checkpoints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.command import (
    check_outputs_and_conditions,
    exit_with_code,
    option_fields,
    resumable,
)
from geoscope.cli.output import Show, TextAnswer
from geoscope.errors import OptionError
from geoscope.verbs.series.options import FollowOptions

if TYPE_CHECKING:
    from geoscope.verbs.series.extrapolation import Extrapolation

__all__ = ["extrapolate", "trajectory"]

Points = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT",
        help="Checkpoints in any order, one run folder, globs, or repo@step_* on the Hub.",
    ),
]
_SELECT = ("include", "exclude", "layers", "map_name")
_RUN = ("base", "initial_adapter", "lora_alpha", "steps")
_COMPUTE = ("max_memory", "jobs", "seed", "cache", "ray")
_TRAJECTORY = ("directions", "spectra", "metrics", "metric", "scalar_r2", "allow_vocab_resize")
_SHOW = (
    "as_json",
    "out",
    "style",
    "force",
    "strict",
    "quiet",
    "details",
    "verbose",
    "debug",
    "fail_on",
)


def _series(*names: str) -> object:
    own = {"base": opt.SeriesBase, "max_memory": opt.SeriesMemory, "seed": opt.SeriesSeed}
    return option_fields(*_RUN, *names, *_COMPUTE, *_SELECT, **own)


def trajectory(
    points: Points,
    *,
    options: Annotated[FollowOptions, _series(*_TRAJECTORY)],
    vectors: opt.Vectors = None,
    show: Annotated[Show, option_fields(*_SHOW)],
) -> None:
    """Drift or diffusion? How far ahead is a run predictable?"""
    from geoscope.verbs.options import Options
    from geoscope.verbs.pairs.selection import ids_of
    from geoscope.verbs.series.follow import follow
    from geoscope.verbs.series.ranks import RANKS, is_of
    from geoscope.verbs.series.report import IDS

    ids = (*IDS, *(key for key in ids_of("compare", Options()) if is_of(key, RANKS)))
    conditions = check_outputs_and_conditions(
        show, kind="trajectory", ids=ids if options.spectra else IDS
    )
    if vectors is not None:
        if not options.directions:
            raise OptionError(
                "--vectors writes leading pairs, but --no-directions does not compute them; "
                "leave one out"
            )
        output.check_file(vectors, ".safetensors", force=show.force)
    with resumable(options), output.matrices(quiet=show.quiet) as progress:
        report = follow(points, options=options, vectors=vectors, progress=progress, argv=sys.argv)
    output.emit(report, show)
    for note in report.provenance.parameters["notes"]:
        output.write_message(f"note: {note}", quiet=show.quiet)
    exit_with_code(report, show, conditions, done="followed")


def extrapolate(
    points: Points,
    *,
    target: opt.ToStep,
    method: opt.Extrapolator = "auto",
    extend: opt.Extend = None,
    training: opt.Training = 1000,
    origins: opt.Origins = None,
    whole_model: opt.WholeModel = False,
    device: opt.TrainDevice = "cpu",
    rank: opt.PredictedRank = None,
    out: opt.PredictedFolder,
    force: opt.ForcePredicted = False,
    options: Annotated[FollowOptions, _series()],
    show: Annotated[Show, option_fields("as_json", "quiet", "debug")],
) -> None:
    """Predicted weights of a later step, where credible."""
    from geoscope.verbs.series.extrapolate import extrapolate as run

    with resumable(options), output.matrices(quiet=show.quiet) as progress:
        predicted = run(
            points,
            target,
            out,
            method=method,
            options=options,
            extend=opt.read_numbers(extend),
            training=training,
            origins=origins,
            whole_model=whole_model,
            device=device,
            rank=rank,
            force=force,
            progress=progress,
        )
    output.answer(_facts(predicted), _told(predicted, whole_model=whole_model), show)
    for note in () if show.as_json else predicted.notes:
        output.write_message(f"note: {note}", quiet=show.quiet)


def _facts(predicted: Extrapolation) -> dict[str, object]:
    return {
        "out": str(predicted.out),
        "folders": [str(folder) for folder in predicted.folders],
        "to_step": predicted.target,
        "last_step": predicted.last,
        "method": predicted.method,
        "skill": predicted.skill,
        "horizon": predicted.horizon,
        "tensors": dict(predicted.chosen),
        "notes": list(predicted.notes),
        "rank": predicted.rank,
        "discarded": predicted.discarded,
    }


def _told(predicted: Extrapolation, *, whole_model: bool) -> TextAnswer:
    """Whether held-out checkpoints justify the distance, and what was written how."""
    from geoscope.report.numbers import number

    is_credible = predicted.ahead <= predicted.horizon
    counts = ", ".join(f"{name} {count}" for name, count in predicted.counts.items())
    lines = [
        f"skill    {number(predicted.skill)} of {predicted.method}, held out, over holding still",
        f"methods  {'tensors' if whole_model else 'matrices'}: {counts}",
    ]
    if predicted.rank is not None:
        left_out = number(predicted.discarded)
        lines.append(f"rank     {predicted.rank}, which leaves out {left_out} of the energy")
    lines += ["", "Skill is about weights and not about the model: evaluate it."]
    return TextAnswer(
        f"Prediction of step {predicted.target}: {', '.join(map(str, predicted.folders))}",
        f"{'WITHIN' if is_credible else 'BEYOND'} WHAT IS CREDIBLE: {predicted.ahead} steps from "
        f"step {predicted.last}; credible are {number(predicted.horizon)}.",
        lines,
    )
