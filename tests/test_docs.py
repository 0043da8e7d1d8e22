"""Is what the documentation says true? Commands, options, numbers and examples, by running them.

GEOSCOPE_WRITE_GOLDEN=1 writes the shown output and the generated page again; read the change in
review. A line `…` in shown output stands for any number of lines.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import geoscope
from geoscope.__main__ import main
from geoscope.cli import app
from geoscope.demo import unpack
from geoscope.metrics import CAPACITY_CODES, CODES, METRICS, THRESHOLDS
from geoscope.metrics.describe import reference_page
from geoscope.metrics.precision import FLOORS
from geoscope.records import Status
from tests.helpers.option_tables import with_table
from tests.helpers.pages import DOCS, PAGES, ROOT, name_of, prose_of, sections, text_of

DEMO = "geoscope-demo"
ELLIPSIS = "…"
HOME = "/home/me"

_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def writing() -> bool:
    return bool(os.environ.get("GEOSCOPE_WRITE_GOLDEN"))


# --- commands and options -----------------------------------------------------------------------


@cache
def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    return result.stdout


def section_of(text: str, title: str) -> list[str]:
    """The indented lines below `title:`."""
    lines = text.splitlines()
    if f"{title}:" not in lines:
        return []
    start = lines.index(f"{title}:") + 1
    found = []
    for line in lines[start:]:
        if not line.startswith(" "):
            break
        found.append(line)
    return found


def commands_below(*group: str) -> list[str]:
    lines = section_of(help_of(*group), "Commands")
    return [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]


COMMANDS = commands_below()


def spellings(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])-{1,2}[a-zA-Z][a-z0-9-]*", text)) - {"-h", "--help"}


def options_of(command: str) -> set[str]:
    """All spellings of the options of a command, and of the commands below it."""
    found: set[str] = set()
    for path in [(command,), *((command, name) for name in commands_below(command))]:
        for line in help_of(*path).splitlines():  # they stand in groups
            if line.startswith("  -"):
                found |= spellings(re.split(r"\s{2,}|<", line.strip())[0])
    return found


def documented_options(page: Path) -> set[str]:
    """Those in the first cells of the tables of a page."""
    cells = re.findall(r"^\| (\[?`-(?:[^|]|\\\|)*) \|", text_of(page), re.MULTILINE)
    return {one for cell in cells for one in spellings(" ".join(re.findall(r"`([^`]*)`", cell)))}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_documented(command: str) -> None:
    page = DOCS / "commands" / f"{command}.md"
    assert page.is_file(), f"`geoscope {command}` has no page {name_of(page)}"
    wanted = with_table(page, text_of(page))
    if writing():
        page.write_text(wanted, encoding="utf-8")
    assert text_of(page) == wanted, (
        f"the options of {name_of(page)} are generated and out of date: "
        "GEOSCOPE_WRITE_GOLDEN=1 python -m pytest tests/test_docs.py"
    )
    assert documented_options(page) == options_of(command)
    for name in commands_below(command):
        assert f"geoscope {command} {name}" in text_of(page)


def test_a_table_of_options_that_was_changed_by_hand_is_noticed() -> None:
    page = DOCS / "commands" / "show.md"
    text = text_of(page)
    for changed in (text.replace("| `--force`", "| `--forced`"), text.replace("| off |", "| |")):
        assert changed != text
        assert with_table(page, changed) == text


def test_readme_lists_every_command() -> None:
    listed = re.findall(r"^\| \[?`geoscope ([a-z-]+)", text_of(ROOT / "README.md"), re.MULTILINE)
    assert sorted(set(listed)) == sorted(COMMANDS)
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == set(COMMANDS)


def test_readme_gives_the_exit_codes_of_the_help() -> None:
    epilog = " ".join(help_of().partition("Exit codes:")[2].split())
    codes = set(re.findall(r"(?:^|; )(\d+) ", epilog))
    shown = set(re.findall(r"^\| (\d+) \|", text_of(ROOT / "README.md"), re.MULTILINE))
    assert codes
    assert shown == codes


# --- numbers that the pages repeat --------------------------------------------------------------


def test_the_page_of_metrics_is_the_generated_one() -> None:
    page, wanted = DOCS / "metrics.md", reference_page()
    if writing():
        page.write_text(wanted, encoding="utf-8")
    assert text_of(page) == wanted, (
        "docs/metrics.md is generated and out of date: "
        "GEOSCOPE_WRITE_GOLDEN=1 python -m pytest tests/test_docs.py"
    )


@pytest.mark.parametrize("metric", METRICS, ids=[one.id for one in METRICS])
def test_every_metric_has_a_section(metric: Any) -> None:
    shown = f"ROLE.{metric.id}" if metric.per_role else metric.id
    assert f"### `{shown}`\n" in text_of(DOCS / "metrics.md")


def test_the_page_of_the_verdict_holds_codes_and_thresholds_in_force() -> None:
    text = text_of(DOCS / "verdict.md")
    for code in CODES:
        assert f"`{code}`" in text
    for code in CAPACITY_CODES:
        assert f"`{code}`" in text_of(DOCS / "commands" / "capacity.md")
    shown = dict(
        re.findall(r"^\| `([a-z_]+\.[a-z0-9_]+)` \| ([^|]*\|[^|]*) \|$", text, re.MULTILINE)
    )
    assert shown == {name: f"{one.value:.4g} | {one.standing}" for name, one in THRESHOLDS.items()}


def test_statuses_and_floors_are_those_of_the_code() -> None:
    for page in ("report.md", "numerics.md"):
        for status in Status:
            assert f"`{status}`" in text_of(DOCS / page)
    for name, (fine, usable) in FLOORS.items():
        assert f"| {name} | {fine:g} | {usable:g} |" in text_of(DOCS / "numerics.md")


def keys_of(value: Any) -> Iterator[str]:
    """The keys that a schema names: those of ids, modules, codes and factors are data."""
    data = ("values", "nulls", "status", "raw", "method", "curves", "model", "modules", "shares")
    data += ("module_nulls", "counts", "thresholds", "ratios", "parameters")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in data or not isinstance(inner, dict):
                yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_the_page_of_the_report_names_every_key(tmp_path: Path) -> None:
    unpack(tmp_path / DEMO)
    base, sft = tmp_path / DEMO / "base", tmp_path / DEMO / "sft"
    step = tmp_path / DEMO / "grpo" / "checkpoint-40"
    options = geoscope.Options(layers=frozenset({0}), device="cpu")
    report = geoscope.compare(base, step, sft, options=options, anchor=sft)
    text = text_of(DOCS / "report.md")
    missing = {key for key in keys_of(report.to_json()) if f"`{key}`" not in text}
    missing |= {key for key in report.provenance.parameters if f"`{key}`" not in text}
    missing |= {
        key.partition("@")[0]
        for overlap in report.overlaps
        for key in overlap.values
        if key.partition("@")[0] not in text
    }
    assert not missing


# --- examples -----------------------------------------------------------------------------------


def examples_of(block: str) -> list[tuple[str, list[str]]]:
    """Each command of a console block with the output that is shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
    for _, shown in found:
        while shown and not shown[-1]:
            shown.pop()
    return found


def segments_of(shown: Sequence[str]) -> list[list[str]]:
    """The parts between the lines `…`; the first and the last may be empty."""
    parts: list[list[str]] = [[]]
    for line in shown:
        if line == ELLIPSIS:
            parts.append([])
        else:
            parts[-1].append(line)
    return parts


def place_of(part: list[str], actual: list[str], start: int, length: int) -> int | None:
    """Where the first `length` lines of a part stand in the output, from `start` on."""
    for at in range(start, len(actual) - len(part) + 1):
        if actual[at : at + length] == part[:length]:
            return at
    return None


def agrees(shown: Sequence[str], actual: list[str]) -> bool:
    """Whether the output is what is shown, `…` standing for anything."""
    first, *others = segments_of(shown)
    if not others:
        return actual == first
    at = len(first)
    if actual[:at] != first:
        return False
    *middle, last = others
    for part in middle:
        place = place_of(part, actual, at, len(part))
        if place is None:
            return False
        at = place + len(part)
    return not last or actual[max(at, len(actual) - len(last)) :] == last


def renewed(shown: Sequence[str], actual: list[str]) -> list[str]:
    """The same cuts of a new output: each part begins with the line it began with."""
    parts, result, at = segments_of(shown), [], 0
    if len(parts) == 1:
        return actual
    for i, part in enumerate(parts):
        place = at if i == 0 else place_of(part, actual, at, 1) if part else len(actual)
        assert place is not None, f"no line {part[0]!r} in the new output: cut it by hand"
        end = len(actual) if part and i == len(parts) - 1 else place + len(part)
        result += [ELLIPSIS] * (i > 0) + actual[place:end]
        at = end
    return result


def stable(lines: Sequence[str]) -> list[str]:
    """Without what depends on the machine or changes with each release."""
    text = "\n".join(lines)
    text = re.sub(r"geoscope \d+\.\d[\w.]*", "geoscope VERSION", text)
    text = re.sub(r"\(\d+ workers\)", "(WORKERS)", text)
    return text.split("\n")


def run(command: str) -> tuple[list[str], int]:
    """What a terminal of 80 columns shows, output and remarks together, and the exit code.

    Whole paths are shown as if the current folder were HOME.
    """
    arguments = shlex.split(command)
    assert arguments[0] == "geoscope", f"not a command of geoscope: {command}"
    buffer = io.StringIO()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with contextlib.redirect_stdout(buffer), contextlib.redirect_stderr(buffer):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
                assert isinstance(code, int)
            finally:
                for signum, handler in handlers.items():
                    signal.signal(signum, handler)
    text = buffer.getvalue().replace(str(Path.cwd()), HOME)
    if is_common(Path(os.environ["GEOSCOPE_CACHE"])):
        text = re.sub(r"^\d+ of \d+ results from the cache .*\n", "", text, flags=re.MULTILINE)
    return text.rstrip("\n").split("\n"), code


def replayed(block: str) -> str:
    """Runs a console block; it must hold. Returns it with the output of today."""
    lines: list[str] = []
    examples = examples_of(block)
    for i, (command, shown) in enumerate(examples):
        lines.append(f"$ {command}")
        if command == "echo $?":
            lines += shown
            continue
        follows = examples[i + 1] if i + 1 < len(examples) else ("", [])
        wanted = int(follows[1][0]) if follows[0] == "echo $?" else 0
        actual, code = run(command)
        assert code == wanted, "\n".join(actual)
        if shown and not writing() and not agrees(stable(shown), stable(actual)):
            pytest.fail(
                f"$ {command}\n" + "\n".join(actual) + "\n\nis not what the page shows: "
                "GEOSCOPE_WRITE_GOLDEN=1 python -m pytest tests/test_docs.py",
                pytrace=False,
            )
        lines += renewed(shown, actual) if shown else []
    return "\n".join(lines) + "\n"


WITH_EXAMPLES = [page for page in PAGES if _CONSOLE.search(text_of(page))]
# Pages whose examples are run each time; the others with the slow tests.
_EACH_TIME = ("README", "collapse", "init-adapter")
QUICK_AND_SLOW = [
    page if page.stem in _EACH_TIME else pytest.param(page, marks=pytest.mark.slow)
    for page in WITH_EXAMPLES
]


# What a run finds in its cache, or leaves there, is what this page shows.
OWN_CACHE = {DOCS / "commands" / "cache.md"}
COMMON = "common-cache"


def is_common(cache: Path) -> bool:
    """Whether results come from other pages: a reader who runs this one alone has none."""
    return cache.name.startswith(COMMON)


@pytest.fixture(scope="module")
def common_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the demo, which most pages read."""
    return tmp_path_factory.mktemp(COMMON)


@pytest.mark.parametrize("page", QUICK_AND_SLOW, ids=name_of)
def test_examples_show_what_is_printed(
    page: Path, tmp_path: Path, common_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(page)
    monkeypatch.chdir(tmp_path)
    if page not in OWN_CACHE:
        monkeypatch.setenv("GEOSCOPE_CACHE", str(common_cache))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if not any("$ geoscope demo" in block for block in _CONSOLE.findall(text)):
        unpack(Path(DEMO))
    parts, end = [], 0
    for match in _CONSOLE.finditer(text):
        parts += [text[end : match.start(1)], replayed(match.group(1))]
        end = match.end(1)
    if writing():
        page.write_text("".join([*parts, text[end:]]), encoding="utf-8")


def test_every_page_of_a_command_has_an_example() -> None:
    for command in COMMANDS:
        blocks = _CONSOLE.findall(text_of(DOCS / "commands" / f"{command}.md"))
        assert any(f"$ geoscope {command}" in block for block in blocks), command


def test_the_elision_of_examples_can_fail() -> None:
    actual = ["a", "b", "c", "d"]
    for shown in (["a", "b", "c", "d"], ["a", "…"], ["…", "b", "…"], ["…", "d"], ["a", "…", "d"]):
        assert agrees(shown, actual), shown
        assert renewed(shown, actual) == shown
    for shown in (["a"], ["b", "…"], ["…", "c"], ["…", "c", "b", "…"], ["a", "…", "b"]):
        assert not agrees(shown, actual), shown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```pycon\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    if not blocks:
        return
    unpack(tmp_path / DEMO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, name_of(page), None, 0)
    said = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(test, out=said.write)
    assert not said.getvalue()


# --- pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in sections(place), f"{name_of(page)} links to {target}"


def test_every_page_is_reached_from_the_index() -> None:
    reached, front = set[Path](), [DOCS / "index.md"]
    while front:
        page = front.pop()
        reached.add(page)
        for target in re.findall(r"\]\(([^)#\s]+\.md)", text_of(page)):
            place = (page.parent / target).resolve()
            if place not in reached and place.is_relative_to(DOCS):
                front.append(place)
    assert set(DOCS.rglob("*.md")) <= reached


@pytest.mark.parametrize(("name", "limit"), [("README.md", 150), ("CONTRIBUTING.md", 50)])
def test_pages_stay_short(name: str, limit: int) -> None:
    assert len(text_of(ROOT / name).splitlines()) < limit


def test_ci_ends_with_the_test_command_of_the_readme() -> None:
    script = text_of(ROOT / ".ci" / "run").rstrip().splitlines()
    assert script[-1].endswith("python -m pytest")
    assert script[-1] in text_of(ROOT / "README.md")


# --- the picture --------------------------------------------------------------------------------


def test_the_picture_of_the_readme_is_the_figure_of_the_demo(tmp_path: Path) -> None:
    picture = DOCS / "images" / "demo.svg"
    assert "(docs/images/demo.svg)" in text_of(ROOT / "README.md")
    unpack(tmp_path / DEMO)
    models = tmp_path / DEMO / "base", tmp_path / DEMO / "grpo" / "checkpoint-320"
    report = geoscope.compare(*models, kind="collapse", options=geoscope.Options(device="cpu"))
    report.save(tmp_path / "demo.svg")
    if writing():
        picture.write_bytes((tmp_path / "demo.svg").read_bytes())
    words = [
        re.findall(r"<!-- (.*?) -->", text_of(path)) for path in (picture, tmp_path / "demo.svg")
    ]
    assert words[0] == words[1]
    assert len(words[0]) > 40


# --- versions -----------------------------------------------------------------------------------


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"], *extras["ray"]]
    lines = text_of(ROOT / "constraints.txt").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)  # no +cpu, no addresses
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pins}
    assert {re.split(r"[<>=~!\[]", one)[0].lower() for one in wanted} <= names


def test_the_citation_is_of_this_version() -> None:
    assert f"version: {geoscope.__version__}\n" in text_of(ROOT / "CITATION.cff")
