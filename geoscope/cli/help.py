"""Help of a command in plain text: arguments, options in groups, an example."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from typer.core import TyperCommand

__all__ = ["EXAMPLES", "GroupedCommand"]

# Command → the words after `geoscope`.
EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "inspect": "inspect org/base runs/grpo/checkpoint-320",
        "collapse": "collapse org/base runs/grpo/checkpoint-320 --explain",
        "anisotropy": "anisotropy org/base runs/grpo/checkpoint-320 --layers 0-3",
        "alignment": "alignment org/base sft/ grpo/ -o overlaps.json",
        "compare": "compare org/base tuned/ -o report.json -o report.png",
        "capacity": "capacity runs/lora/checkpoint-240 --details",
        "trajectory": "trajectory runs/grpo --base org/base -o run.json",
        "extrapolate": "extrapolate runs/grpo --base org/base --to-step 400 -o predicted/",
        "lineage": "lineage runs/merged org/base org/other",
        "watch": "watch runs/grpo --base org/base --fail-on RANK_COLLAPSE --log wandb",
        "init-adapter": "init-adapter org/base --method geora --rank 32 -o start/",
        "verify-adapter": "verify-adapter start/ --with-peft",
        "convert-adapter": "convert-adapter start/ trained/ -o plain/",
        "show": "show report.json --details -o report.md",
        "join": "join part-*.json -o report.json",
        "metrics": "metrics stable_rank",
        "schema": "schema > report.schema.json",
        "demo": "demo",
        "list": "cache list",
        "clear": "cache clear",
    }
)
_ARGUMENTS, _OTHERS = "Arguments", "Options"


class GroupedCommand(TyperCommand):
    """A command whose options stand in the groups of `geoscope.cli.options`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {_ARGUMENTS: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(_group(parameter), []).append(record)
        groups[_OTHERS] = groups.pop(_OTHERS, [])  # --help, after all others
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.name is not None and self.name in EXAMPLES:
            with formatter.section("Example"):
                formatter.write(f"{'':{formatter.current_indent}}geoscope {EXAMPLES[self.name]}\n")
        super().format_epilog(ctx, formatter)


def _group(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _ARGUMENTS
    return getattr(parameter, "rich_help_panel", None) or _OTHERS
