"""Commands that write and check adapters: init-adapter, verify-adapter, convert-adapter."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geoscope.cli import options as opt
from geoscope.cli import output

if TYPE_CHECKING:
    from geoscope.verbs.adapters.initialise import Initialised
    from geoscope.verbs.adapters.options import InitOptions
    from geoscope.verbs.adapters.verify import Check, Verification

__all__ = ["convert_adapter", "init_adapter", "verify_adapter"]

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
    from geoscope.verbs.adapters.initialise import default_output, initialise

    chosen = _options(options)
    given = _model(model)
    out = options["out_folder"] or default_output(given, chosen)
    output.check_outputs(options["report"], force=options["force"])
    with output.matrices(quiet=options["quiet"]) as progress:
        made = initialise(
            given,
            out,
            chosen,
            command=_command(given, out, options),
            argv=sys.argv,
            progress=progress,
            on_start=lambda count: output.say_in_pipe(
                f"{chosen.method} of rank {chosen.rank} for {count} matrices of {given}, to {out}",
                quiet=options["quiet"],
            ),
        )
    output.emit(made.report, {**options, "out": options["report"]})
    _tell(made, chosen, options)


def _model(given: str | None) -> str:
    """MODEL, or the current folder where it holds one."""
    if given is not None:
        return given
    from geoscope.verbs.adapters.initialise import model_here

    return model_here()


def _options(options: dict[str, Any]) -> InitOptions:
    from geoscope.names import parse_layers
    from geoscope.verbs.adapters.options import InitOptions

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
        output.remark(f"start error of a weight, ‖W_start − W‖/‖W‖, at most: {listed}", quiet=quiet)
    if chosen.chosen_layout == "residual":
        output.remark(
            "a trainer that holds the base in bfloat16 starts that far off the model; "
            "--layout mirror is exact there",
            quiet=quiet,
        )
    output.remark(f"KL reference: {kl_rule(chosen.chosen_layout)}", quiet=quiet)
    for note in made.card.notes:
        output.remark(f"note: {note}", quiet=quiet)
    what = layout_words(chosen.chosen_layout)
    output.remark(f"wrote {made.out}: {what}; {made.readme} tells how to load it", quiet=quiet)


# --- verify-adapter -------------------------------------------------------------------------------

_QUIET = {name: opt.OUTPUT[name] for name in ("as_json", "quiet", "debug")}
_BASE = {
    "base": opt.Spec(
        str | None,
        None,
        ("--base",),
        "The original model, where the folder does not tell it: folder or org/name[@revision].",
        "MODEL",
    ),
}


@opt.with_options(
    _BASE,
    {
        "allow_lossy": opt.Spec(
            bool,
            False,
            ("--allow-lossy",),
            "A start further off the model than 1e-5 is told and is no failure.",
        ),
        "with_peft": opt.Spec(
            bool,
            False,
            ("--with-peft",),
            "Also load it with transformers and PEFT, and compare the logits.",
        ),
    },
    _QUIET,
)
def verify_adapter(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Output of init-adapter, or an adapter folder.")
    ],
    **options: Any,
) -> None:
    """Is an adapter folder what it says it is?"""
    from geoscope.verbs.adapters.verify import verify_adapter as verify

    with output.matrices(quiet=options["quiet"]) as progress:
        found = verify(
            folder,
            base=options["base"],
            allow_lossy=options["allow_lossy"],
            with_peft=options["with_peft"],
            on_module=lambda done, total: progress.on_pair(done, total, ""),
        )
    if options["as_json"]:
        output.document(json.dumps({**asdict(found), "ok": found.ok}, indent=2, sort_keys=True))
    else:
        output.data(_verification(found))
    if not found.ok:
        raise typer.Exit(1)


def _verification(found: Verification) -> str:
    """One line a check, what failed with its reason."""
    layout = f", layout {found.layout}" if found.layout else ""
    lines = [f"{found.folder} on {found.base}{layout}"]
    lines += [f"{_mark(check)} {check.text}" for check in found.checks]
    lines += [f"note: {note}" for note in found.notes]
    failed = sum(not check.ok for check in found.checks)
    lines.append(f"{failed} of {len(found.checks)} checks failed" if failed else "all checks hold")
    return "\n".join(lines)


def _mark(check: Check) -> str:
    if not check.ok:
        return "FAIL"
    return "warn" if check.is_warning else "ok  "


# --- convert-adapter ------------------------------------------------------------------------------


@opt.with_options(
    {
        "out_folder": opt.Spec(
            Path, ..., ("--out", "-o"), "Folder to write the plain LoRA to.", "OUT"
        ),
        "rank": opt.Spec(
            int | None,
            None,
            ("--rank", "-r"),
            "Compress to this rank, and say what is lost. Default: exact, twice the rank.",
            "R",
        ),
        **_BASE,
        "force": opt.Spec(
            bool, False, ("--force",), "Another run's start, and over an earlier output."
        ),
    },
    _QUIET,
)
def convert_adapter(
    initial: Annotated[
        str,
        typer.Argument(
            metavar="INIT", help="Output of init-adapter, or an adapter saved before training."
        ),
    ],
    trained: Annotated[
        str, typer.Argument(metavar="TRAINED", help="The same adapter after training.")
    ],
    **options: Any,
) -> None:
    """A trained adapter as a plain LoRA on its original base."""
    from geoscope.report.numbers import number
    from geoscope.verbs.adapters.convert import convert_adapter as convert
    from geoscope.verbs.adapters.convert import discarded_share
    from geoscope.verbs.adapters.output import write_conversion

    conversion = convert(
        initial,
        trained,
        rank=options["rank"],
        base=options["base"],
        force=options["force"],
    )
    out = options["out_folder"]
    words = ["geoscope", "convert-adapter", initial, trained, "-o", out.as_posix()]
    for name in ("rank", "base"):
        words += [] if options[name] is None else [f"--{name}", str(options[name])]
    found = write_conversion(
        conversion,
        out,
        force=options["force"],
        command=[shlex.quote(word) for word in words],
    )
    config = conversion.config
    lost = discarded_share(found)
    if options["as_json"]:
        told = {"out": str(out), "rank": config["r"], "lora_alpha": config["lora_alpha"]}
        told |= {"base": config["base_model_name_or_path"], "discarded": lost}
        told |= {"modules": [{**asdict(one), "share": one.share} for one in found]}
        told |= {"notes": list(conversion.notes)}
        output.document(json.dumps(told, indent=2, sort_keys=True))
        return
    output.data(
        f"{out}: LoRA of rank {config['r']}, lora_alpha {config['lora_alpha']:g}, on "
        f"{config['base_model_name_or_path']}"
    )
    if found:
        worst = max(found, key=lambda one: one.share)
        output.data(
            f"left out by the rank: {number(lost)} of the update's energy, at most "
            f"{number(worst.share)} ({worst.name})"
        )
    for note in conversion.notes:
        output.remark(f"note: {note}", quiet=options["quiet"])
