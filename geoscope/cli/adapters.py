"""Commands that write and check adapters: init-adapter, verify-adapter, convert-adapter."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.command import option_fields, repeated, resumable
from geoscope.cli.output import Show, TextAnswer
from geoscope.verbs.adapters.options import InitOptions

if TYPE_CHECKING:
    from geoscope.verbs.adapters.converted import Converted
    from geoscope.verbs.adapters.initialised import Initialised
    from geoscope.verbs.adapters.verify import Check, Verification

__all__ = ["convert_adapter", "init_adapter", "verify_adapter"]

_METHOD = (
    *("method", "rank", "alpha", "rho", "spec_rank", "scale_convention"),
    *("targets", "layout", "residual_dtype"),
)
_SELECT = ("include", "exclude", "layers")


def init_adapter(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or org/name[@revision]. Default: the current folder, if it holds a model.",
        ),
    ] = None,
    *,
    options: Annotated[
        InitOptions,
        option_fields(
            *_METHOD,
            "force",
            *_SELECT,
            "device",
            "solver",
            "max_memory",
            "jobs",
            "seed",
            "cache",
            "ray",
            force=opt.ForceInit,
            device=opt.InitDevice,
            max_memory=opt.SeriesMemory,
            seed=opt.InitSeed,
        ),
    ],
    out: opt.InitFolder = None,
    files: opt.ReportFiles = None,
    show: Annotated[
        Show, option_fields("as_json", "style", "quiet", "details", "verbose", "debug")
    ],
) -> None:
    """Initial weights of an adapter: GeoRA, PiSSA, RLPO …."""
    from geoscope.verbs.adapters.initialise import default_output, initialise, model_here

    model = model_here() if model is None else model
    out = out or default_output(model, options)
    output.check_outputs(files or (), force=options.force)
    with resumable(options), output.matrices(quiet=show.quiet) as progress:
        made = initialise(
            model,
            out,
            options,
            command=repeated(context, (model, "-o", out.as_posix()), (*_METHOD, *_SELECT, "seed")),
            argv=sys.argv,
            progress=progress,
            on_start=lambda count: output.say_in_pipe(
                f"{options.method} of rank {options.rank} for {count} matrices of {model}, "
                f"to {out}",
                quiet=show.quiet,
            ),
        )
    output.emit(made.report, replace(show, out=files or ()))
    _tell(made, options, show.quiet)


def _tell(made: Initialised, options: InitOptions, quiet: bool) -> None:
    """Start error, the KL rule and where the recipe stands, on standard error."""
    from geoscope.records.card import kl_rule, layout_words
    from geoscope.report.numbers import number

    errors = made.card.start_errors
    listed = ", ".join(f"{number(error)} in {dtype}" for dtype, error in errors.items())
    if options.chosen_layout:
        output.remark(f"start error of a weight, ‖W_start − W‖/‖W‖, at most: {listed}", quiet=quiet)
    if options.chosen_layout == "residual":
        output.remark(
            "a trainer that holds the base in bfloat16 starts that far off the model; "
            "--layout mirror is exact there",
            quiet=quiet,
        )
    output.remark(f"KL reference: {kl_rule(options.chosen_layout)}", quiet=quiet)
    for note in made.card.notes:
        output.remark(f"note: {note}", quiet=quiet)
    what = layout_words(options.chosen_layout)
    output.remark(f"wrote {made.out}: {what}; {made.readme} tells how to load it", quiet=quiet)


# --- verify-adapter -------------------------------------------------------------------------------

Answer = Annotated[Show, option_fields("as_json", "quiet", "debug")]


def verify_adapter(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Output of init-adapter, or an adapter folder.")
    ],
    *,
    base: opt.OriginalBase = None,
    allow_lossy: opt.AllowLossy = False,
    with_peft: opt.WithPeft = False,
    show: Answer,
) -> None:
    """Is an adapter folder what it says it is?"""
    from geoscope.verbs.adapters.verify import verify_adapter as verify

    with output.matrices(quiet=show.quiet) as progress:
        verification = verify(
            folder,
            base=base,
            allow_lossy=allow_lossy,
            with_peft=with_peft,
            on_module=lambda done, total: progress.on_pair(done, total, ""),
        )
    facts = {**asdict(verification), "ok": verification.ok}
    output.answer(facts, _verification(verification), show)
    if not verification.ok:
        raise typer.Exit(1)


def _verification(verification: Verification) -> TextAnswer:
    """A line a check, what failed with its reason."""
    layout = f", layout {verification.layout}" if verification.layout else ""
    checks = verification.checks
    failed = [check for check in checks if not check.ok]
    headline = f"ALL CHECKS HOLD: {len(checks)} of {len(checks)}."
    if failed:
        headline = f"NOT SOUND: {len(failed)} of {len(checks)} checks failed."
    lines = [f"{_mark(check)} {check.text}" for check in checks]
    lines += [f"note: {note}" for note in verification.notes]
    return TextAnswer(f"{verification.folder} on {verification.base}{layout}", headline, lines)


def _mark(check: Check) -> str:
    if not check.ok:
        return "FAIL"
    return "warn" if check.is_warning else "ok  "


# --- convert-adapter ------------------------------------------------------------------------------


def convert_adapter(
    context: typer.Context,
    initial: Annotated[
        str,
        typer.Argument(
            metavar="INIT", help="Output of init-adapter, or an adapter saved before training."
        ),
    ],
    trained: Annotated[
        str, typer.Argument(metavar="TRAINED", help="The same adapter after training.")
    ],
    *,
    out: opt.PlainFolder,
    rank: opt.CutRank = None,
    base: opt.OriginalBase = None,
    force: opt.ForcePlain = False,
    show: Answer,
) -> None:
    """A trained adapter as a plain LoRA on its original base."""
    from geoscope.verbs.adapters.converted import convert_adapter as convert

    words = repeated(context, (initial, trained, "-o", out.as_posix()), ("rank", "base"))
    made = convert(initial, trained, out, rank=rank, base=base, force=force, command=words)
    output.answer(_facts(made), _converted(made), show)
    for note in () if show.as_json else made.notes:
        output.remark(f"note: {note}", quiet=show.quiet)


def _facts(made: Converted) -> dict[str, object]:
    config = made.config
    return {
        "out": str(made.out),
        "rank": config["r"],
        "lora_alpha": config["lora_alpha"],
        "base": config["base_model_name_or_path"],
        "discarded": made.discarded,
        "modules": [{**asdict(module), "share": module.share} for module in made.modules],
        "notes": list(made.notes),
    }


def _converted(made: Converted) -> TextAnswer:
    """What was written, and what its rank leaves out of the update."""
    from geoscope.report.numbers import number

    config = made.config
    what = f"PLAIN LORA OF RANK {config['r']}"
    lines = [
        f"lora_alpha  {config['lora_alpha']:g}",
        f"base        {config['base_model_name_or_path']}",
    ]
    title = f"Adapter converted: {made.out}"
    if not made.modules:
        return TextAnswer(title, f"{what}: exact.", lines)
    worst = max(made.modules, key=lambda module: module.share)
    lines.append(f"worst       {number(worst.share)} left out of {worst.name}")
    discarded = number(made.discarded)
    return TextAnswer(title, f"{what}: {discarded} of the update's energy is left out.", lines)
