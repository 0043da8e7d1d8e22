"""The commands that compare a base with tuned models."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.cache import results_folder
from geoscope.cli.fail_on import Condition, holding, parse_fail_on
from geoscope.cli.limits import parse_limits
from geoscope.errors import OptionError, first_names
from geoscope.kinds import KINDS
from geoscope.profile import Profile, profiling, stage

if TYPE_CHECKING:
    from geoscope.records import Report
    from geoscope.verbs.options import Options

__all__ = ["alignment", "anisotropy", "capacity", "collapse", "compare", "inspect"]

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Base model: folder, file or org/name[@revision].")
]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="Tuned model, spelled likewise.")]
SeveralTuned = Annotated[
    list[str], typer.Argument(metavar="TUNED", help="One or more tuned models.")
]


@opt.with_options(
    opt.OUTPUT,
    opt.SELECT,
    opt.ADAPTER,
    opt.PAIRING,
    opt.FAIL_ON,
    opt.VERDICT,
    opt.CURVES,
    opt.QUICK,
    opt.DIMENSIONS,
    opt.COMPUTE,
)
def collapse(base: Base, tuned: Tuned, **options: Any) -> None:
    """Spectral collapse: shift, ranks, intruders, verdict."""
    _run("collapse", base, [tuned], options)


@opt.with_options(
    opt.OUTPUT, opt.SELECT, opt.ADAPTER, opt.NO_BASE, opt.PAIRING, opt.FAIL_ON, opt.QUICK,
    opt.COMPUTE,
)  # fmt: skip
def anisotropy(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Base model; with --no-base the adapter.")
    ],
    tuned: Annotated[
        str | None, typer.Argument(metavar="TUNED", help="Tuned model, or an adapter.")
    ] = None,
    **options: Any,
) -> None:
    """Update anisotropy: how many directions it uses."""
    if options.pop("no_base"):
        if tuned is not None:
            raise OptionError("--no-base takes an adapter alone: one argument")
        _run("anisotropy", None, [base], options)
        return
    if tuned is None:
        raise OptionError("two models are needed, BASE TUNED; or one adapter with --no-base")
    _run("anisotropy", base, [tuned], options)


@opt.with_options(
    opt.OUTPUT,
    opt.SELECT,
    opt.ADAPTER,
    opt.PAIRING,
    opt.FAIL_ON,
    {name: opt.VERDICT[name] for name in ("explain", "limit")},
    opt.BUDGET,
    opt.COMPUTE,
)
def capacity(
    base: Annotated[
        str, typer.Argument(metavar="ADAPTER|BASE", help="An adapter, or the base of TUNED.")
    ],
    tuned: Annotated[
        str | None, typer.Argument(metavar="TUNED", help="Tuned model, or an adapter.")
    ] = None,
    **options: Any,
) -> None:
    """Rank used by an adapter; ranks that would hold an update."""
    options |= {"quick": False}
    if tuned is None:
        _run("capacity", None, [base], options)
    else:
        _run("capacity", base, [tuned], options)


@opt.with_options(
    opt.OUTPUT,
    opt.SELECT,
    opt.ADAPTER,
    opt.PAIRING,
    opt.FAIL_ON,
    opt.MASKS,
    opt.CURVES,
    opt.QUICK,
    opt.DIMENSIONS,
    opt.COMPUTE,
)
def alignment(base: Base, tuned: SeveralTuned, **options: Any) -> None:
    """On or off the base's principal directions?"""
    _run("alignment", base, tuned, options)


@opt.with_options(
    opt.OUTPUT,
    opt.SELECT,
    opt.ADAPTER,
    opt.PAIRING,
    opt.FAIL_ON,
    opt.VERDICT,
    opt.MASKS,
    opt.CURVES,
    opt.QUICK,
    opt.DIMENSIONS,
    opt.COMPUTE,
)
def compare(base: Base, tuned: SeveralTuned, **options: Any) -> None:
    """All of these in one pass, with the verdict."""
    _run("compare", base, tuned, options)


@opt.with_options(
    {name: opt.OUTPUT[name] for name in ("as_json", "verbose", "debug")},
    opt.SELECT,
    opt.ADAPTER,
    opt.PAIRING,
)
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, file or org/name[@revision].")
    ],
    tuned: Annotated[
        str | None, typer.Argument(metavar="TUNED", help="A tuned model to pair it with.")
    ] = None,
    **options: Any,
) -> None:
    """Tensors, pairing and plan, from headers alone."""
    from geoscope.verbs.options import Options

    chosen = Options(**_selection(options), device="cpu")
    _survey(model, tuned, chosen, options)


def _run(kind: str, base: str | None, tuned: list[str], options: dict[str, Any]) -> None:
    """One comparison, or without a base one adapter: refuse early, compute, show, exit."""
    from geoscope.verbs.options import Interrupted
    from geoscope.verbs.pairs.alone import measure_adapter
    from geoscope.verbs.pairs.compare import compare as run

    chosen = _options(options)
    conditions = _conditions(kind, chosen, options.get("fail_on"))
    output.check_outputs(options["out"], force=options["force"])
    if options["dry_run"]:
        for one in tuned:
            _survey(base, one, chosen, options)
        return
    profile = Profile()
    try:
        with profiling(profile), output.progress(quiet=options["quiet"]) as progress:
            if base is None:
                report = measure_adapter(
                    tuned[0], kind, options=chosen, progress=progress, argv=sys.argv
                )
            else:
                report = run(
                    base,
                    *tuned,
                    kind=kind,
                    options=chosen,
                    anchor=options.get("anchor"),
                    progress=progress,
                    argv=sys.argv,
                )
    except Interrupted as stop:
        if stop.report is not None:
            output.emit(stop.report, options)
        output.say(f"geoscope: {stop}; the report is partial")
        raise typer.Exit(128 + stop.signum) from None
    with profiling(profile), stage("render"):
        output.emit(report, options)
    if options["verbose"] and not options["quiet"]:
        output.say(_profile_text(profile))
    raise typer.Exit(_exit_code(report, conditions, options))


def _profile_text(profile: Profile) -> str:
    """Where the time went, summed over the threads."""
    total = sum(profile.seconds.values())
    parts = [f"{name} {seconds / total:.0%}" for name, seconds in profile.seconds.items()]
    return f"time: {total:.1f} s over all threads: {', '.join(parts)}"


def _exit_code(report: Report, conditions: tuple[Condition, ...], options: dict[str, Any]) -> int:
    coverage = report.coverage
    if not coverage.matched:
        output.say("geoscope: no matrix could be compared; the report says why for each")
        return 1
    if options["strict"] and coverage.missing:
        output.say(
            f"geoscope: --strict: {len(coverage.missing)} matrices not compared: "
            f"{first_names(coverage.missing)}"
        )
        return 1
    if met := holding(conditions, report):
        output.say(f"geoscope: --fail-on: {', '.join(met)}")
        return 3
    return 0


def _conditions(kind: str, chosen: Options, text: str | None) -> tuple[Condition, ...]:
    from geoscope.verbs.pairs.selection import ids_of

    return parse_fail_on(text, kind=kind, codes=KINDS[kind].codes, ids=ids_of(kind, chosen))


def _survey(base: str | None, tuned: str | None, chosen: Options, options: dict[str, Any]) -> None:
    """Headers, pairing and plan on standard output."""
    from geoscope.report.survey import render_survey
    from geoscope.verbs.pairs.alone import prepare_alone
    from geoscope.verbs.pairs.prepare import prepare, survey

    if base is None:
        assert tuned is not None
        prepared = prepare_alone(tuned, chosen)
    else:
        prepared = prepare(base, base if tuned is None else tuned, chosen)
    found = survey(prepared, paired=base is not None and tuned is not None)
    if options["as_json"]:
        output.document(found.dumps())
    else:
        output.data(render_survey(found, verbose=options["verbose"]))


def _selection(options: dict[str, Any]) -> dict[str, Any]:
    from geoscope.names import parse_layers

    return {
        "include": tuple(options["include"] or ()),
        "exclude": tuple(options["exclude"] or ()),
        "layers": parse_layers(options["layers"]) if options["layers"] else None,
        "map_name": tuple(options["map_name"] or ()),
        "initial_adapter": options["initial_adapter"],
        "lora_alpha": options["lora_alpha"],
        "allow_vocab_resize": options["allow_vocab_resize"],
    }


def _options(options: dict[str, Any]) -> Options:
    from geoscope.verbs.options import Options

    same = ("device", "dtype", "solver", "max_memory", "jobs", "seed")
    return Options(
        **_selection(options),
        **{name: options[name] for name in same},
        ks=_dimensions(options.get("k", opt.DIMENSIONS["k"].default)),
        curves=options.get("curves", False),
        quick=options["quick"],
        masks=options.get("masks", False),
        budget=_count(options.get("budget")),
        limits=parse_limits(options.get("limit") or ()),
        cache=results_folder() if options["resume"] else None,
    )


def _count(text: str | None) -> int | None:
    """A number of parameters: 20M, 1.5B, 300000."""
    if text is None:
        return None
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    digits, unit = text.strip().upper(), 1
    if digits[-1:] in units:
        digits, unit = digits[:-1], units[digits[-1]]
    try:
        return int(float(digits) * unit)
    except (ValueError, OverflowError):
        raise OptionError(f"--budget {text!r}: write a number such as 300000 or 20M") from None


def _dimensions(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise OptionError(f"--k {text!r}: write whole numbers such as 8,64") from None
