"""Commands that write and check adapters: init-adapter, verify-adapter, convert-adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from geoscope.analysis.init_options import InitOptions
    from geoscope.analysis.initialise import Initialised

__all__ = ["init_adapter"]

_METHOD: dict[str, opt.Spec] = {
    "method": opt.Spec(str, "geora", ("--method",), "geora, pissa, milora, olora or lora.", "NAME"),
    "rank": opt.Spec(int, 16, ("--rank", "-r"), "Rank of the adapter.", "R"),
    "alpha": opt.Spec(
        float | None,
        None,
        ("--alpha",),
        "lora_alpha; the scale is alpha/rank. Default 2 × rank.",
        "A",
    ),
    "rho": opt.Spec(
        float | None, None, ("--rho",), "geora: quantile of both masks. Default 0.2.", "SHARE"
    ),
    "spec_rank": opt.Spec(
        int | None,
        None,
        ("--spec-rank",),
        "geora: rank of the part of W that the spectral mask looks at. Default: --rank.",
        "R",
    ),
    "scale_convention": opt.Spec(
        str | None,
        None,
        ("--scale-convention",),
        "geora: keeps the singular values (default); pissa: divides them by alpha/rank.",
        "NAME",
    ),
    "targets": opt.Spec(
        str | None,
        None,
        ("--targets",),
        "Only modules of these names, such as q_proj,v_proj. Default: every linear layer in a "
        "block, without routers.",
        "NAME,NAME…",
    ),
    "layout": opt.Spec(
        str | None,
        None,
        ("--layout",),
        "residual (default): a rewritten base and an adapter. mirror (experimental): one adapter "
        "of twice the rank on the original base, exact in every dtype. anchor: two adapters, for "
        "your own training loop.",
        "NAME",
    ),
    "residual_dtype": opt.Spec(
        str | None,
        None,
        ("--residual-dtype",),
        "dtype of the rewritten matrices: float32 (default), bfloat16 or float16.",
        "NAME",
    ),
}

_OUTPUT: dict[str, opt.Spec] = {
    "out_folder": opt.Spec(
        Path | None,
        None,
        ("--out", "-o"),
        "Folder to write. Default: a name made of model, method and rank.",
        "OUT",
    ),
    "report": opt.Spec(
        list[Path] | None,
        None,
        ("--report",),
        "Also write the report as FILE.{json,csv,md,png,svg,pdf}. May be given again.",
        "FILE",
    ),
    "force": opt.Spec(bool, False, ("--force",), "Replace files of an earlier run in OUT."),
}

_COMPUTE = {
    "device": opt.Spec(str, "auto", ("--device",), "auto, cpu, cuda or cuda:N.", "NAME"),
    "solver": opt.Spec(
        str | None,
        None,
        ("--solver",),
        "auto: the fastest method whose error bound is met; exact: LAPACK's SVD throughout.",
        "NAME",
    ),
    "jobs": opt.COMPUTE["jobs"],
    "seed": opt.Spec(int, 0, ("--seed",), "Seed of random factors and sampled nulls.", "N"),
}


@opt.with_options(
    _METHOD,
    _OUTPUT,
    {name: opt.OUTPUT[name] for name in ("as_json", "quiet", "verbose", "debug")},
    opt.SELECT,
    _COMPUTE,
)
def init_adapter(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or org/name[@revision]. Default: the current folder, if it holds a model.",
        ),
    ] = None,
    **options: Any,
) -> None:
    """GeoRA, PiSSA, MiLoRA, OLoRA or LoRA initial weights."""
    from geoscope.analysis.initialise import default_output, initialise

    chosen = _options(options)
    given = _model(model)
    out = options["out_folder"] or default_output(given, chosen)
    output.check_outputs(options["report"], force=options["force"])
    with output.matrices(quiet=options["quiet"]) as progress:
        made = initialise(
            given, out, chosen, command=_command(given, out, options), progress=progress
        )
    output.emit(made.report, {**options, "out": options["report"]})
    _tell(made, chosen, options)


def _model(given: str | None) -> str:
    """MODEL, or the current folder where it holds one."""
    if given is not None:
        return given
    from geoscope.checkpoints import open_checkpoint

    try:
        open_checkpoint(".")
    except CheckpointError as error:
        raise OptionError(
            f"no MODEL given, and the current folder is none ({error}); name a folder or a Hub id"
        ) from None
    return "."


def _options(options: dict[str, Any]) -> InitOptions:
    from geoscope.analysis.init_options import InitOptions
    from geoscope.names import parse_layers

    same = (
        *("method", "rank", "alpha", "rho", "spec_rank", "scale_convention", "layout"),
        *("residual_dtype", "device", "solver", "jobs", "seed", "force"),
    )
    return InitOptions(
        **{name: options[name] for name in same},
        targets=tuple(filter(None, (options["targets"] or "").split(","))),
        include=tuple(options["include"] or ()),
        exclude=tuple(options["exclude"] or ()),
        layers=parse_layers(options["layers"]) if options["layers"] else None,
    )


def _command(model: str, out: Path, options: dict[str, Any]) -> list[str]:
    """The words that make the same folder again."""
    words = ["geoscope", "init-adapter", model, "-o", out.as_posix()]
    for name, spec in {**_METHOD, **opt.SELECT, "seed": _COMPUTE["seed"]}.items():
        value = options[name]
        if value == spec.default or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [spec.names[0], str(one)]
    return [shlex.quote(word) for word in words]


def _tell(made: Initialised, chosen: InitOptions, options: dict[str, Any]) -> None:
    """Start error, the KL rule and where the recipe stands, on standard error."""
    from geoscope.report.card import kl_rule, layout_words
    from geoscope.report.numbers import number

    quiet = options["quiet"]
    errors = made.card.start_errors
    listed = ", ".join(f"{number(error)} in {dtype}" for dtype, error in errors.items())
    if chosen.chosen_layout:
        output.say(f"start error of a weight, ‖W_start − W‖/‖W‖, at most: {listed}", quiet=quiet)
    if chosen.chosen_layout == "residual":
        output.say(
            "a trainer that holds the base in bfloat16 starts that far off the model; "
            "--layout mirror is exact there",
            quiet=quiet,
        )
    output.say(f"KL reference: {kl_rule(chosen.chosen_layout)}", quiet=quiet)
    for note in made.card.notes:
        output.say(f"note: {note}", quiet=quiet)
    what = layout_words(chosen.chosen_layout)
    output.say(f"wrote {made.out}: {what}; README.md there tells how to load it", quiet=quiet)
