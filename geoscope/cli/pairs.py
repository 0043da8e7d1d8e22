"""The commands that compare a base with tuned models."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.command import check_outputs_and_conditions, exit_with_code, option_fields
from geoscope.cli.output import Show
from geoscope.errors import OptionError
from geoscope.profile import Profile, profiling, stage
from geoscope.verbs.options import Interrupted, Options

__all__ = ["alignment", "anisotropy", "capacity", "collapse", "compare", "inspect"]

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Base model: folder, file or org/name[@revision].")
]
Tuned = Annotated[
    str, typer.Argument(metavar="TUNED", help="Tuned model, in one of the forms of BASE.")
]
SeveralTuned = Annotated[
    list[str], typer.Argument(metavar="TUNED", help="One or more tuned models.")
]
Adapter = Annotated[str | None, typer.Argument(metavar="TUNED", help="Tuned model, or an adapter.")]

_SHOW = (
    *("as_json", "out", "style", "force", "strict", "dry_run", "quiet", "details", "verbose"),
    *("debug", "fail_on"),
)
_PAIR = (
    *("include", "exclude", "layers", "initial_adapter", "lora_alpha"),
    *("map_name", "allow_vocab_resize"),
)
_COMPUTE = ("device", "dtype", "solver", "max_memory", "jobs", "seed", "cache", "ray")

Shown = Annotated[Show, option_fields(*_SHOW)]
Explained = Annotated[Show, option_fields(*_SHOW, "explain")]


def collapse(
    base: Base,
    tuned: Tuned,
    *,
    show: Explained,
    options: Annotated[
        Options, option_fields(*_PAIR, "limits", "curves", "quick", "ks", *_COMPUTE)
    ],
    anchor: opt.Anchor = None,
    part: opt.Part = None,
) -> None:
    """Spectral collapse: shift, ranks, intruders, verdict."""
    _run("collapse", base, [tuned], options, show, anchor, part)


def anisotropy(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Base model; with --no-base the adapter.")
    ],
    tuned: Adapter = None,
    *,
    show: Shown,
    options: Annotated[Options, option_fields(*_PAIR, "quick", *_COMPUTE)],
    no_base: opt.NoBase = False,
    part: opt.Part = None,
) -> None:
    """Update anisotropy: how many directions it uses."""
    if no_base and tuned is not None:
        raise OptionError("--no-base takes an adapter alone: one argument")
    if not no_base and tuned is None:
        raise OptionError("two models are needed, BASE TUNED; or one adapter with --no-base")
    _run("anisotropy", *_alone_or_pair(base, tuned), options, show, part=part)


def capacity(
    base: Annotated[
        str, typer.Argument(metavar="ADAPTER|BASE", help="An adapter, or the base of TUNED.")
    ],
    tuned: Adapter = None,
    *,
    show: Explained,
    options: Annotated[Options, option_fields(*_PAIR, "limits", "budget", *_COMPUTE)],
    part: opt.Part = None,
) -> None:
    """Rank used by an adapter; ranks that would hold an update."""
    _run("capacity", *_alone_or_pair(base, tuned), options, show, part=part)


def alignment(
    base: Base,
    tuned: SeveralTuned,
    *,
    show: Shown,
    options: Annotated[Options, option_fields(*_PAIR, "masks", "curves", "quick", "ks", *_COMPUTE)],
    part: opt.Part = None,
) -> None:
    """On or off the base's principal directions?"""
    _run("alignment", base, tuned, options, show, part=part)


def compare(
    base: Base,
    tuned: SeveralTuned,
    *,
    show: Explained,
    options: Annotated[
        Options, option_fields(*_PAIR, "limits", "masks", "curves", "quick", "ks", *_COMPUTE)
    ],
    anchor: opt.Anchor = None,
    part: opt.Part = None,
) -> None:
    """All of these in one pass, with the verdict."""
    _run("compare", base, tuned, options, show, anchor, part)


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, file or org/name[@revision].")
    ],
    tuned: Annotated[
        str | None, typer.Argument(metavar="TUNED", help="A tuned model to pair it with.")
    ] = None,
    *,
    show: Annotated[Show, option_fields("as_json", "verbose", "debug")],
    options: Annotated[Options, option_fields(*_PAIR)],
) -> None:
    """Tensors, pairing and plan, from headers alone."""
    _survey(model, tuned, replace(options, device="cpu"), show)


def _alone_or_pair(base: str, tuned: str | None) -> tuple[str | None, list[str]]:
    """One argument is an adapter without its base."""
    return (None, [base]) if tuned is None else (base, [tuned])


def _run(
    kind: str,
    base: str | None,
    tuned: list[str],
    options: Options,
    show: Show,
    anchor: str | None = None,
    part: str | None = None,
) -> None:
    """One comparison, or without a base one adapter: refuse early, compute, show, exit."""
    from geoscope.verbs.pairs.compare import compare as run
    from geoscope.verbs.pairs.compare import measure_adapter

    conditions = check_outputs_and_conditions(show, kind=kind, ids=_ids(kind, options))
    if show.dry_run:
        for model in tuned:
            _survey(base, model, options, show)
        return
    if part is not None:
        _part(kind, base, tuned, options, show, anchor, part)
        return
    profile = Profile()
    try:
        with profiling(profile), output.progress(quiet=show.quiet) as progress:
            how = {"options": options, "progress": progress, "argv": sys.argv}
            if base is None:
                report = measure_adapter(tuned[0], kind, **how)
            else:
                report = run(base, *tuned, kind=kind, anchor=anchor, **how)
    except Interrupted as stop:
        if stop.report is not None:
            output.emit(stop.report, show)
        output.write_error(f"{stop}; the report is partial")
        raise typer.Exit(128 + stop.signum) from None
    with profiling(profile), stage("render"):
        output.emit(report, show)
    if show.verbose:
        output.write_message(_profile_text(profile), quiet=show.quiet)
    exit_with_code(report, show, conditions, done="compared")


def _part(
    kind: str,
    base: str | None,
    tuned: list[str],
    options: Options,
    show: Show,
    anchor: str | None,
    text: str,
) -> None:
    """One part, into its file; what concerns all matrices waits for `join`."""
    from geoscope.verbs.pairs.parts import compare_part, write_part

    part = opt.read_part(text)
    assert part is not None
    if len(tuned) > 1 or anchor is not None:
        raise OptionError("--part compares BASE with one TUNED; leave other models out")
    if len(show.out) != 1 or show.out[0].suffix != ".json":
        raise OptionError("--part writes one file: give -o FILE.json, another for each part")
    if show.fail_on or show.strict:
        raise OptionError(
            "--part gives no verdict; use --fail-on with `geoscope show` on the joined report"
        )
    try:
        with output.progress(quiet=show.quiet) as progress:
            how = {"kind": kind, "options": options, "progress": progress}
            made = compare_part(base, tuned[0], part, **how)
    except Interrupted as stop:
        output.write_message(
            "geoscope: interrupted; what was computed is kept, give the command again"
        )
        raise typer.Exit(128 + stop.signum) from None
    write_part(made, show.out[0])
    count, whole = len(made.matrices), len(made.about.pairing.matrices)
    output.data(
        f"part {made.number} of {made.of}: {count} of {whole} matrices in {show.out[0]}\n"
        "With all parts there: geoscope join PART.json … -o report.json"
    )


def _profile_text(profile: Profile) -> str:
    """Where the time went, summed over the threads."""
    total = sum(profile.seconds.values())
    parts = [f"{name} {seconds / total:.0%}" for name, seconds in profile.seconds.items()]
    return f"time: {total:.1f} s over all threads: {', '.join(parts)}"


def _ids(kind: str, options: Options) -> tuple[str, ...]:
    from geoscope.verbs.pairs.selection import ids_of

    return ids_of(kind, options)


def _survey(base: str | None, tuned: str | None, options: Options, show: Show) -> None:
    """Headers, pairing and plan on standard output."""
    from geoscope.report.survey import render_survey
    from geoscope.verbs.pairs.alone import prepare_alone
    from geoscope.verbs.pairs.nodes import spread_survey
    from geoscope.verbs.pairs.prepare import prepare, survey

    if base is None:
        assert tuned is not None
        prepared = prepare_alone(tuned, options)
    else:
        prepared = prepare(base, base if tuned is None else tuned, options)
    paired = base is not None and tuned is not None
    tell = survey if options.ray is None else partial(spread_survey, options=options)
    headers = tell(prepared, paired=paired)
    if show.as_json:
        output.document(headers.dumps())
    else:
        output.data(render_survey(headers, verbose=show.verbose))
