"""The library as Python calls it: texts, paths and numbers as users write them; its own words."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import geoscope
from geoscope.cli import command_line
from geoscope.cli.wording import in_options, option_names
from geoscope.errors import OptionError
from geoscope.names import NameMap, Selection
from geoscope.verbs.adapters.converted import convert_adapter
from geoscope.verbs.series.extrapolate import extrapolate
from tests.helpers.matrices import save_model
from tests.helpers.running import run, write_pair

PACKAGE = Path(geoscope.__file__).parent


class Spelled(os.PathLike[str]):
    """A path-like object that is neither a string nor a Path."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def __fspath__(self) -> str:
        return self.path


SPELLINGS = pytest.mark.parametrize("spell", [str, Path, Spelled])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]) -> Path:
    from safetensors.torch import load_file

    root = tmp_path_factory.mktemp("run")
    base, tuned = (load_file(folder / "model.safetensors") for folder in pair)
    for i in range(1, 5):
        weights = {name: base[name] + i / 4 * (tuned[name] - base[name]) for name in base}
        save_model(root / f"checkpoint-{i}", weights)
    return root


# --- one text is one pattern --------------------------------------------------------------------

OPTIONS = (
    geoscope.Options,
    geoscope.FollowOptions,
    geoscope.InitOptions,
    geoscope.LineageOptions,
    Selection,
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["include", "exclude", "map_name", "targets"])
def test_one_text_is_one_pattern(options: Callable[..., Any], name: str) -> None:
    if name not in options.__dataclass_fields__:  # pyright: ignore[reportFunctionMemberAccess]
        pytest.skip("has no such field")
    text = "q_proj=x"
    assert getattr(options(**{name: text}), name) == (text,)
    assert getattr(options(**{name: [text, "b=c"]}), name) == (text, "b=c")
    for wrong in (b"q_proj", 3, [text, 3], {"a": 1}.items()):
        with pytest.raises(OptionError, match=f"^`{name}` "):
            options(**{name: wrong})


def test_one_rule_for_names_is_one_rule() -> None:
    assert NameMap("^policy=model").given == ("^policy=model",)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
def test_layers_are_a_text_a_number_or_several(options: Callable[..., Any]) -> None:
    assert options(layers="0-1,7").layers == {0, 1, 7}
    assert options(layers=3).layers == {3}
    assert options(layers=range(2)).layers == {0, 1}
    assert options(layers=None).layers is None
    for wrong in (1.5, b"0", [0, "1"], True):
        with pytest.raises(OptionError, match=r"^`layers` "):
            options(layers=wrong)


def test_numbers_and_sizes() -> None:
    some: Any = geoscope.Options
    assert some(ks=4).ks == (4,) and some(ks=[4, 8]).ks == (4, 8)
    assert some(max_memory=10**9).max_memory == "1000000000"
    assert some(cache="kept").cache == Path("kept")
    follow: Any = geoscope.FollowOptions
    assert follow(steps=[10, 20]).steps == "10,20" and follow(steps=5).steps == "5"
    for name, wrong in (("ks", "8"), ("ks", True), ("ks", [8.0]), ("max_memory", 1.5)):
        with pytest.raises(OptionError, match=f"^`{name}` "):
            some(**{name: wrong})


SCALARS: list[tuple[Callable[..., Any], str, Any]] = [
    (geoscope.Options, "seed", 1.5),
    (geoscope.Options, "jobs", "2"),
    (geoscope.Options, "dtype", 64),
    (geoscope.Options, "curves", 1),
    (geoscope.Options, "lora_alpha", "8"),
    (geoscope.FollowOptions, "directions", None),
    (geoscope.InitOptions, "rank", True),
    (geoscope.InitOptions, "alpha", "16"),
    (geoscope.LineageOptions, "seed", "x" * 200),
]


@pytest.mark.parametrize(("options", "name", "wrong"), SCALARS)
def test_a_value_of_another_type_is_refused_by_name(
    options: Callable[..., Any], name: str, wrong: Any
) -> None:
    with pytest.raises(OptionError, match=rf"^`{name}` .* is needed$") as caught:
        options(**{name: wrong})
    assert len(str(caught.value)) < 100


def test_numbers_of_numpy_become_those_of_python() -> None:
    loose: Any = geoscope.InitOptions
    options = loose(rank=np.int64(4), alpha=np.float32(8), seed=np.int32(3))
    assert [type(one) for one in (options.rank, options.alpha, options.seed)] == [int, float, int]


def test_a_pattern_chooses_what_the_command_line_chooses(pair: tuple[Path, Path]) -> None:
    options = geoscope.Options(include="q_proj")
    found = geoscope.compare(*pair, kind="collapse", options=options)
    told = run("collapse", *pair, "--include", "q_proj", "--json", "--no-resume").report
    names = [layer.name for layer in found.layers]
    assert names == [layer["name"] for layer in told["layers"]]
    assert len(names) == 2 and all("q_proj" in name for name in names)


# --- paths --------------------------------------------------------------------------------------


@SPELLINGS
def test_every_function_takes_every_spelling_of_a_path(
    spell: Callable[[Any], Any], pair: tuple[Path, Path], series: Path, tmp_path: Path
) -> None:
    base, tuned = map(spell, pair)
    report = geoscope.compare(base, tuned, kind="collapse", anchor=tuned)
    geoscope.write_report(report, spell(tmp_path / "r.json"))
    assert geoscope.read_report(spell(tmp_path / "r.json")) == report
    options: Any = geoscope.FollowOptions
    followed = geoscope.follow(
        spell(series), options=options(base=base), vectors=spell(tmp_path / "v.safetensors")
    )
    steps = [spell(series / f"checkpoint-{i}") for i in range(1, 5)]
    again = geoscope.follow(steps, options=options(base=base))
    assert followed.summary == again.summary and (tmp_path / "v.safetensors").exists()
    chosen = geoscope.InitOptions(method="lora", rank=2)
    made = geoscope.initialise(base, spell(tmp_path / "out"), chosen)
    assert geoscope.verify_adapter(spell(made.out), base=base).ok
    predicted = extrapolate(
        spell(series), 5, spell(tmp_path / "far"), method="linear", options=options(base=base),
        force=True,
    )  # fmt: skip
    assert predicted.out == tmp_path / "far"


def test_bytes_and_nothing_are_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    loose: Any = geoscope
    report = geoscope.compare(*pair, kind="collapse")
    calls: list[tuple[str, Callable[[Any], Any]]] = [
        ("base", lambda path: loose.compare(path, pair[1])),
        ("tuned", lambda path: loose.compare(pair[0], path)),
        ("anchor", lambda path: loose.compare(*pair, anchor=path)),
        ("references", lambda path: loose.follow(path)),
        ("references", lambda path: loose.follow([path])),
        ("vectors", lambda path: loose.follow("run", vectors=path)),
        ("path", lambda path: loose.write_report(report, path)),
        ("path", lambda path: loose.read_report(path)),
        ("model", lambda path: loose.initialise(path, tmp_path / "out")),
        ("out", lambda path: loose.initialise(pair[0], path)),
        ("folder", lambda path: loose.verify_adapter(path)),
        ("base", lambda path: loose.verify_adapter("out", base=path)),
        ("initial", lambda path: convert_adapter(path, "trained")),
        ("trained", lambda path: convert_adapter(pair[0], path)),
        ("base", lambda path: loose.FollowOptions(base=path)),
        ("metrics", lambda path: loose.FollowOptions(metrics=path)),
        ("initial_adapter", lambda path: loose.Options(initial_adapter=path)),
    ]
    for name, call in calls:
        for wrong in (b"run", "", 7):
            with pytest.raises(OptionError, match=f"^`{name}` .*path") as caught:
                call(wrong)
            assert "\n" not in str(caught.value)


# --- its own words ------------------------------------------------------------------------------


def test_the_library_reads_no_command_line(
    pair: tuple[Path, Path], series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook", "--secret"])
    chosen = geoscope.InitOptions(method="lora", rank=2)
    reports = [
        geoscope.compare(*pair, kind="collapse"),
        geoscope.follow(series),
        geoscope.initialise(pair[0], tmp_path / "out", chosen).report,
    ]
    assert [report.provenance.argv for report in reports] == [(), (), ()]
    words = ["collapse", *map(str, pair), "--json"]
    assert run(*words).report["provenance"]["argv"] == ["geoscope", *words]


def test_a_report_is_shown_in_a_line(pair: tuple[Path, Path]) -> None:
    report = geoscope.compare(*pair, kind="collapse")
    shown = repr(report)
    assert len(shown) < 1000 and len(shown.splitlines()) == 1
    assert report.summary.verdict is not None
    for part in ("collapse", str(pair[0]), str(pair[1]), "4 matrices", report.summary.verdict.code):
        assert part in shown
    json.loads(report.dumps())  # whole as before


def test_errors_name_parameters_and_the_command_line_its_options(pair: tuple[Path, Path]) -> None:
    with pytest.raises(OptionError, match=r"^`ks` \[0\]: "):
        geoscope.Options(ks=(0,))
    assert run("collapse", *pair, "--k", "0").err.startswith("geoscope: --k [0]: ")
    with pytest.raises(OptionError, match=r"^`max_memory` 'much': "):
        geoscope.compare(*pair, options=geoscope.Options(max_memory="much"))
    told = run("collapse", *pair, "--max-memory", "much").err
    assert "geoscope: --max-memory 'much': " in told


def _raised(path: Path) -> list[str]:
    """The texts inside the raise statements of a module."""
    statements = [node for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Raise]
    texts = [one for node in statements for one in ast.walk(node) if isinstance(one, ast.Constant)]
    return [one.value for one in texts if isinstance(one.value, str)]


# Options of other programs, and a command that is named with its own.
FOREIGN = {
    "--safe_serialization",
    "--tag",
    *("--max-lora-rank", "--enable-lora", "--lora-modules"),  # vLLM
    *("--model", "--adapter-path", "--save-path", "--dequantize"),  # mlx_lm
    *("--backend", "--local_dir", "--target_dir", "--save_hf_ckpt"),  # verl, DeepSpeed
    "--report",
    "--head",  # ray
    *(
        f"--{name}" for name in ("ink", "grey", "line", "paper", *(f"c{i}" for i in range(9)))
    ),  # of CSS
}


def _texts(path: Path) -> Iterator[str]:
    """Every text of a module but its documentation."""
    module = ast.parse(path.read_text())
    told = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


LIBRARY = [path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("cli", "demo")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_error_of_the_library_names_an_option(path: Path) -> None:
    names = option_names(command_line())
    options = {*names.values()} - {"--verbose", "--report"}
    for text in _raised(path):
        assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) & options, text
        for parameter in re.findall(r"`(\w+)`", text):
            assert in_options(f"`{parameter}`", names).startswith("--"), text


def test_no_text_of_the_library_names_an_option() -> None:
    """Notes, reasons and checks name parameters; the command line puts its options there."""
    named = {
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in LIBRARY
        if path.name != "__main__.py" and path.parent.name != "integrations"  # argv of a child
        for text in _texts(path)
        if {*re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} - FOREIGN
    }
    assert named == set()


def test_the_probe_sees_options_in_texts() -> None:
    found = [text for path in (PACKAGE / "cli").glob("*.py") for text in _texts(path)]
    assert any("--fail-on" in text for text in found)
    assert not any("The command line: thin" in text for text in found)  # documentation


def test_reports_of_the_command_line_say_its_options(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    chosen = ["--include", "q_proj", "--map-name", "^nothing=x", "--details"]
    done = run("compare", *pair, *chosen, "-o", tmp_path / "r.json", "-o", tmp_path / "r.md")
    texts = [done.out, done.err, *((tmp_path / name).read_text() for name in ("r.json", "r.md"))]
    wanted = ("--include", "--map-name ^", "--include", "--include")
    for text, words in zip(texts, wanted, strict=True):
        assert words in text
        assert not re.search(r"`(include|map_name|exclude)\\?`", text)
    options = geoscope.Options(include="q_proj", map_name="^nothing=x")
    report = geoscope.compare(*pair, options=options)
    assert {one.reason for one in report.coverage.skipped} >= {"not matched by `include`"}
    assert "`map_name` ^nothing=x: changes no name" in report.provenance.parameters["notes"]
    saved = geoscope.read_report(tmp_path / "r.json")
    assert saved.layers == report.layers
    assert "not matched by --include" in {one.reason for one in saved.coverage.skipped}
    shown = run("inspect", *pair, "--include", "q_proj", "--verbose").out
    assert "not matched by --include" in shown and "`include`" not in shown


def test_markdown_names_options_too() -> None:
    names = {"map_name": "--map-name"}
    assert in_options(r"give \`map_name\` or `map_name`", names) == "give --map-name or --map-name"
    assert in_options("`model.layers.0.map_name` `other`", names) == (
        "`model.layers.0.map_name` `other`"
    )
