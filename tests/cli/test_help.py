"""Help is complete, and free of heavy imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from typer.main import get_command

import geoscope
from geoscope.cli import app
from geoscope.cli.help import EXAMPLES
from tests.helpers.running import process, run

# What help may not wait for: seconds each.
HEAVY = {"torch", "numpy", "scipy", "matplotlib", "safetensors", "huggingface_hub"}
IMPORTED = """
import json, sys
sys.argv = ["geoscope", *json.loads(sys.argv[1])]
from geoscope.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its path, groups included."""

    def walk(path: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk((*path, name), child)

    yield from walk((), get_command(app))


COMMANDS = dict(commands())
every_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["compare", "--help"], ["cache", "--help"], ["init-adapter", "-h"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(done.stderr))
    assert "typer" in loaded  # the probe sees what is there
    assert not HEAVY & loaded


@every_command
def test_every_command_and_option_is_explained(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help
    assert command.help.strip()[-1] in ".?"
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        text = getattr(parameter, "help", None)
        assert text, f"{path}: {parameter.name} has no help"
        assert text.rstrip().endswith("."), f"{path}: {parameter.name}: {text!r}"


@every_command
def test_every_command_answers_help(path: tuple[str, ...]) -> None:
    long, short = run(*path, "--help"), run(*path, "-h")
    assert (long.code, long.err) == (0, "")
    assert short == long
    assert "\x1b" not in long.out
    for parameter in COMMANDS[path].params:
        for option in getattr(parameter, "opts", ()):
            if option.startswith("-"):
                assert option in long.out


@every_command
def test_help_calls_values_by_their_names_and_fits(path: tuple[str, ...]) -> None:
    text = run(*path, "--help").out
    assert not re.search(r"^ +-.*<[a-z]", text, re.MULTILINE), "a Python type for an option"
    assert max(map(len, text.splitlines())) <= 80
    for parameter in COMMANDS[path].params:
        is_switch = getattr(parameter, "is_flag", False) or parameter.name == "help"
        assert is_switch or parameter.metavar, f"{path}: {parameter.name}"


def test_the_front_page_lists_every_command_and_the_exit_codes() -> None:
    text = run("--help").out
    assert "..." not in text.partition("Commands:")[2], "a summary is cut"
    page = " ".join(text.split())
    for path in COMMANDS:
        if path:
            assert path[0] in page
    for meaning in (
        "0 success",
        "1 error",
        "2 wrong usage",
        "3 --fail-on",
        "130 interrupted",
        "143",
    ):
        assert meaning in page


@pytest.mark.parametrize("path", [one for one in COMMANDS if one and one[0] != "cache"])
def test_every_command_tells_the_exit_codes(path: tuple[str, ...]) -> None:
    assert "Exit codes: 0 success" in run(*path, "--help").out


def test_no_argument_shows_the_front_page() -> None:
    done = run()
    assert done.code == 2
    assert "Usage:" in done.out + done.err


def test_version_is_that_of_the_package_and_of_what_it_runs_on() -> None:
    told = run("--version").out
    assert told == process("--version").out
    first, *others = told.splitlines()
    assert first == f"geoscope {geoscope.__version__}"  # a line for programs
    text = " ".join(others)
    for package in ("torch", "numpy", "scipy", "safetensors"):
        assert f"{package} {version(package)}" in text
    assert f"Python {sys.version.split()[0]}" in text


@pytest.mark.parametrize("path", [each for each in COMMANDS if hasattr(COMMANDS[each], "callback")])
def test_options_stand_in_groups(path: tuple[str, ...]) -> None:
    if not path or path == ("cache",):
        return
    text = run(*path, "--help").out
    for parameter in COMMANDS[path].params:
        if parameter.param_type_name == "option":
            group = parameter.rich_help_panel
            assert group, f"{path}: {parameter.opts[0]} is in no group of cli/options.py"
            block = text.partition(f"\n{group}:\n")[2].partition("\n\n")[0]
            assert parameter.opts[0] in block


@pytest.mark.parametrize("path", [each for each in COMMANDS if each and each != ("cache",)])
def test_every_command_has_an_example_that_it_takes(path: tuple[str, ...]) -> None:
    words = EXAMPLES[path[-1]].partition(">")[0].split()
    assert tuple(words[: len(path)]) == path
    assert f"geoscope {EXAMPLES[path[-1]]}" in run(*path, "--help").out
    command, rest = COMMANDS[path], words[len(path) :]
    context = command.make_context(path[-1], list(rest))  # raises for what it does not take
    written = " ".join(map(str, context.params.values()))
    assert all(word.rstrip("/") in written for word in rest if not word.startswith("-"))


def test_a_shell_can_complete() -> None:
    done = process(_GEOSCOPE_COMPLETE="complete_bash", COMP_WORDS="geoscope comp", COMP_CWORD="1")
    assert done.out.split() == ["compare"]


# Options whose object differs with the command; the words of each command say which it is.
OWN_WORDS = {
    "--out": "a report, or the folder that is written",
    "--force": "files of a report, or of a folder",
    "--base": "the model at step 0, or the one an adapter belongs to",
    "--method": "an initialisation, or an extrapolator",
    "--rank": "of the initial adapter, or to compress to",
    "--device": "of the spectra, of one matrix at a time, or of a network that trains",
    "--seed": "of what the command draws",
    "--max-memory": "the default is by pairs, by matrices of a series, or by copies of one matrix",
    "--metrics": "a file of curves, or the numbers of each line",
    "--budget": "parameters of an adapter, or seconds a checkpoint",
}


def test_one_option_means_the_same_everywhere() -> None:
    """The same words, letters and text wherever an option occurs."""
    meanings: dict[str, set[tuple[str, ...]]] = {}
    for path, command in COMMANDS.items():
        for parameter in command.params:
            opts: tuple[str, ...] = tuple(getattr(parameter, "opts", ()))
            if opts and opts[0].startswith("--") and path:
                meanings.setdefault(opts[0], set()).add((*opts, parameter.help or ""))
    assert len(meanings) > 15
    differing = {name for name, found in meanings.items() if len(found) > 1}
    assert differing == set(OWN_WORDS)
