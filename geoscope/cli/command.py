"""What all commands have in common: options as objects, and the way from a report to an exit code.

A command takes an option as a parameter, `masks: opt.Masks = False`, or many at once as an object
of the library's own options: `options: Annotated[Options, option_fields("include", "exclude")]` is
made of these fields.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, NoReturn, get_args, get_origin

import typer

from geoscope.cli import options as opt
from geoscope.cli import output
from geoscope.cli.fail_on import Condition, holding, parse_fail_on
from geoscope.cli.output import Show
from geoscope.errors import Stopped, first_names
from geoscope.kinds import KINDS
from geoscope.records import Report
from geoscope.verbs.choices import Resume

__all__ = [
    "OptionFields",
    "as_typer_command",
    "check_outputs_and_conditions",
    "exit_with_code",
    "option_fields",
    "repeated",
    "resumable",
]


@dataclass(frozen=True)
class OptionFields:
    """The fields of a class of options that a command takes, in this order, each with its words."""

    words: Mapping[str, Any]


def option_fields(*names: str, **own: Any) -> OptionFields:
    """These fields, in the words of the alias of the same name, or for some in words of their own.

    A field that stands in `own` alone comes last.
    """
    return OptionFields({name: own.get(name) or _alias(name) for name in (*names, *own)})


def _alias(field: str) -> Any:
    return getattr(opt, "".join(part.capitalize() for part in field.split("_")))


def as_typer_command(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: an option for each field of its parameters of options."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, tuple[type, OptionFields]] = {
        parameter.name: get_args(parameter.annotation)[:2]
        for parameter in parameters
        if _is_group(parameter.annotation)
    }

    def call(**written: Any) -> None:
        made = {name: _made(*group, written) for name, group in groups.items()}
        own = {parameter.name for parameter in parameters} - set(groups)
        command(**made, **{name: written[name] for name in own})

    shown: list[inspect.Parameter] = []
    for parameter in parameters:
        group = groups.get(parameter.name)
        options = [parameter] if group is None else _parameters(*group)
        shown += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in options]
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__annotations__ = {each.name: each.annotation for each in shown}
    call.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportFunctionMemberAccess]
    return call


def _is_group(annotation: Any) -> bool:
    parts = get_args(annotation) if get_origin(annotation) is Annotated else ()
    return any(isinstance(part, OptionFields) for part in parts)


def _reader(alias: Any) -> opt.Read | None:
    return next((part for part in get_args(alias) if isinstance(part, opt.Read)), None)


def _parameters(kind: type, group: OptionFields) -> list[inspect.Parameter]:
    """An option for each field that is taken, with the field's default."""
    defaults = {each.name: each.default for each in fields(kind)}
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name] if (read := _reader(alias)) is None else read.default,
            annotation=alias,
        )
        for name, alias in group.words.items()
    ]


def _made(kind: type, group: OptionFields, written: Mapping[str, Any]) -> Any:
    """The options that the words make."""
    values = {}
    for name, alias in group.words.items():
        read = _reader(alias)
        values[name] = written[name] if read is None else read.value(written[name])
    return kind(**values)


# --- from a report to an exit code ----------------------------------------------------------------


def check_outputs_and_conditions(
    show: Show, *, kind: str, ids: Collection[str] = (), codes: Collection[str] | None = None
) -> tuple[Condition, ...]:
    """The conditions of --fail-on; refuses what could not hold or be written later.

    codes: that a verdict may have; those of the kind by default.
    Raises OptionError or ReportError.
    """
    if codes is None:
        codes = KINDS[kind].codes if kind in KINDS else ()
    conditions = parse_fail_on(show.fail_on, kind=kind, codes=codes, ids=ids)
    output.check_outputs(show.out, force=show.force)
    return conditions


def exit_with_code(
    report: Report, show: Show, conditions: Sequence[Condition], *, done: str | None = None
) -> None:
    """Ends the process where its exit code is not 0, and says why.

    done: what this command did to the matrices, such as "compared"; None where it computed nothing.
    """
    coverage = report.coverage
    if done and not coverage.matched:
        _fail(f"no matrix could be {done}; the report says why for each", 1)
    if show.strict and coverage.missing:
        missing = coverage.missing
        _fail(f"--strict: {len(missing)} matrices not {done}: {first_names(missing)}", 1)
    if met := holding(conditions, report):
        _fail(f"--fail-on: {', '.join(met)}", 3)


def _fail(reason: str, code: int) -> NoReturn:
    output.write_error(reason)
    raise typer.Exit(code)


@contextmanager
def resumable(options: Resume) -> Iterator[None]:
    """Work whose finished matrices are kept: a stop says that the same command goes on."""
    try:
        yield
    except Stopped as stop:
        if options.cache is None:
            raise
        output.write_error("interrupted; what was computed is kept, give the command again")
        raise typer.Exit(stop.exit_code) from None


def repeated(
    context: typer.Context, positional: Sequence[object], names: Sequence[str]
) -> list[str]:
    """The words that do the same again: the command, and the options that are not at their default.

    names: of the parameters that belong to it.
    """
    words = ["geoscope", str(context.info_name), *map(str, positional)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name not in names or value in (None, parameter.default):
            continue
        for part in value if isinstance(value, (list, tuple)) else (value,):
            words += [parameter.opts[0], str(part)]
    return [shlex.quote(word) for word in words]
