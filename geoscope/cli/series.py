"""Commands on a series of checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.fail_on import holding, parse_fail_on
from geoscope.errors import OptionError, first_names

if TYPE_CHECKING:
    from geoscope.verbs.series.options import FollowOptions

__all__ = ["extrapolate", "trajectory"]

Points = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT",
        help="Checkpoints in any order, one run folder, globs, or repo@step_* on the Hub.",
    ),
]

_SERIES: dict[str, opt.Spec] = {
    "base": opt.Spec(
        str | None,
        None,
        ("--base",),
        "The model at step 0. Default: the first checkpoint of a series of models; an adapter "
        "starts at zero.",
        "MODEL",
    ),
    **opt.ADAPTER,
    "steps": opt.Spec(
        str | None,
        None,
        ("--steps",),
        "Steps of the checkpoints in the order given, such as 10,20,50, in place of their names.",
        "LIST",
    ),
    "directions": opt.Spec(
        bool,
        True,
        ("--directions/--no-directions",),
        "Leading pairs of every update and step: the spatial rank-1 statistics.",
    ),
    "metrics": opt.Spec(
        str | None,
        None,
        ("--metrics",),
        "Metric curves: trainer_state.json, .csv or .jsonl with a step column. Default: the "
        "trainer_state.json of the last checkpoint.",
        "FILE",
    ),
    "metric": opt.Spec(
        str | None,
        None,
        ("--metric",),
        "The curve to relate the weights to, such as reward. Default: the only one.",
        "NAME",
    ),
    "jobs": opt.COMPUTE["jobs"],
    "seed": opt.Spec(int, 0, ("--seed",), "Seed of bootstraps and searches.", "N"),
}
_SHOW = {name: spec for name, spec in opt.OUTPUT.items() if name != "dry_run"}


_TRAJECTORY: dict[str, opt.Spec] = {
    "scalar_r2": opt.Spec(
        str | None,
        None,
        ("--scalar-r2",),
        "R² of every single entry on a line in t, as RLVR-Linearity reports it: of `all` entries, "
        "or by the `published` filter. One more pass over whole models; not for adapters.",
        "all|published",
    ),
    "vectors": opt.Spec(
        Path | None,
        None,
        ("--vectors",),
        "Write the leading pairs of every update and step, with aligned signs, to this "
        ".safetensors file.",
        "FILE",
    ),
}


@opt.with_options(_SERIES, _TRAJECTORY, _SHOW, opt.SELECT, opt.MAP_NAME, opt.FAIL_ON)
def trajectory(points: Points, **options: Any) -> None:
    """Drift or diffusion? A run step by step, and how far it can be foretold."""
    from geoscope.verbs.series.follow import follow
    from geoscope.verbs.series.report import CODES, IDS

    chosen = _options(options)
    conditions = parse_fail_on(options["fail_on"], kind="trajectory", codes=CODES, ids=IDS)
    output.check_outputs(options["out"], force=options["force"])
    if options["vectors"] is not None:
        if not options["directions"]:
            raise OptionError("--vectors are leading pairs, which --no-directions leaves out")
        output.check_file(options["vectors"], ".safetensors", force=options["force"])
    with output.matrices(quiet=options["quiet"]) as progress:
        report = follow(
            points, options=chosen, vectors=options["vectors"], progress=progress, argv=sys.argv
        )
    output.emit(report, options)
    for note in report.provenance.parameters["notes"]:
        output.say(f"note: {note}", quiet=options["quiet"])
    if options["strict"] and report.coverage.missing:
        output.say(
            f"geoscope: --strict: {len(report.coverage.missing)} matrices not followed: "
            f"{first_names(report.coverage.missing)}"
        )
        raise typer.Exit(1)
    if met := holding(conditions, report):
        output.say(f"geoscope: --fail-on: {', '.join(met)}")
        raise typer.Exit(3)


def _options(options: dict[str, Any]) -> FollowOptions:
    from geoscope.names import parse_layers
    from geoscope.verbs.series.options import FollowOptions

    return FollowOptions(
        base=options["base"],
        initial_adapter=options["initial_adapter"],
        lora_alpha=options["lora_alpha"],
        steps=options["steps"],
        directions=options["directions"],
        scalar_r2=options.get("scalar_r2"),
        metrics=options.get("metrics"),
        metric=options.get("metric"),
        include=tuple(options["include"] or ()),
        exclude=tuple(options["exclude"] or ()),
        layers=parse_layers(options["layers"]) if options["layers"] else None,
        map_name=tuple(options["map_name"] or ()),
        jobs=options["jobs"],
        seed=options["seed"],
    )


@opt.with_options(
    {
        "to_step": opt.Spec(int, ..., ("--to-step",), "The step to predict.", "N"),
        "method": opt.Spec(
            str,
            "auto",
            ("--method",),
            "auto (each matrix its best held-out method), hold, two-point, linear, linear-origin, "
            "relex, relex-pinned, spatial-rank1, spatial-rank1-pinned, alpha-rank1, next (trains "
            "networks: a minute or more), damped (of linear), or "
            "damped(…) of one.",
            "NAME",
        ),
        "predict_extend": opt.Spec(
            str | None,
            None,
            ("--predict-extend",),
            "Of --method next: write W_T + c·Δ̂ for each c into OUT/c….",
            "C,C,…",
        ),
        "train_steps": opt.Spec(
            int, 1000, ("--train-steps",), "Training steps of the networks of --method next.", "N"
        ),
        "origins": opt.Spec(
            int | None,
            None,
            ("--origins",),
            "Of --method next: origins of the backtest at which its networks train again. Default: "
            "3, as many as a credible horizon takes; 1 with --force.",
            "N",
        ),
        "whole_model": opt.Spec(
            bool,
            False,
            ("--whole-model",),
            "Of --method next: norms and biases train its networks and are predicted, too, and "
            "without --include also embeddings and the output head, as published.",
        ),
        "device": opt.Spec(
            str, "cpu", ("--device",), "Where --method next trains: cpu, cuda or cuda:N.", "NAME"
        ),
        "rank": opt.Spec(
            int | None,
            None,
            ("--rank",),
            "Of a series of adapters: rank of the predicted one; default twice theirs.",
            "R",
        ),
        "out_folder": opt.Spec(
            Path, ..., ("--out", "-o"), "Folder to write the predicted model or adapter to.", "OUT"
        ),
        "force": opt.Spec(
            bool,
            False,
            ("--force",),
            "Beyond the credible horizon, far from the base, over an earlier output.",
        ),
    },
    {name: _SERIES[name] for name in ("base", "initial_adapter", "lora_alpha", "steps")},
    {name: _SERIES[name] for name in ("jobs", "seed")},
    {name: opt.OUTPUT[name] for name in ("as_json", "quiet", "debug")},
    opt.SELECT,
    opt.MAP_NAME,
)
def extrapolate(points: Points, **options: Any) -> None:
    """Predicted weights of a later step, as far as held-out checkpoints justify them."""
    from geoscope.report.numbers import number
    from geoscope.verbs.series.extrapolate import extrapolate as run

    chosen = _options({**options, "directions": True})
    with output.matrices(quiet=options["quiet"]) as progress:
        made = run(
            points,
            options["out_folder"],
            options["to_step"],
            method=options["method"],
            options=chosen,
            extend=_factors(options["predict_extend"]),
            training=options["train_steps"],
            origins=options["origins"],
            whole_model=options["whole_model"],
            device=options["device"],
            rank=options["rank"],
            force=options["force"],
            progress=progress,
        )
    if options["as_json"]:
        told = {"out": str(made.out), "folders": [str(one) for one in made.folders]}
        told |= {"to_step": made.target, "last_step": made.last}
        told |= {"method": made.method, "skill": made.skill, "horizon": made.horizon}
        told |= {"tensors": dict(made.chosen), "notes": list(made.notes)}
        told |= {"rank": made.rank, "discarded": made.discarded}
        output.document(json.dumps(told, indent=2, sort_keys=True))
        return
    folders = ", ".join(map(str, made.folders))
    adapter = ""
    if made.rank is not None:
        left_out = number(made.discarded)
        adapter = f"adapter of rank {made.rank}, which leaves out {left_out} of the energy\n"
    counts = ", ".join(f"{name} {count}" for name, count in made.counts.items())
    output.data(
        f"{folders}: step {made.target} from checkpoints up to step {made.last}\n"
        f"{adapter}"
        f"{'tensors' if options['whole_model'] else 'matrices'} by method: {counts}\n"
        f"held-out skill of {made.method}: {number(made.skill)} over holding the last checkpoint; "
        f"credible up to {number(made.horizon)} steps ahead, asked for {made.ahead}\n"
        "skill is about weights and not about the model: evaluate it"
    )
    for note in made.notes:
        output.say(f"note: {note}", quiet=options["quiet"])


def _factors(text: str | None) -> tuple[float, ...]:
    """The numbers of --predict-extend."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise OptionError(f"--predict-extend {text!r}: write numbers such as 0.5,1,2") from None
