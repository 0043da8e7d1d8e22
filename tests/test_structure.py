"""Is the house still built as it was drawn? Read from the source, without running it.

The arrows between the wings, the one place that factorises, the front door's list of names.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import geoscope
from geoscope import errors

PACKAGE = Path(geoscope.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def offenders(
    check: Callable[[Path], Iterable[str]], paths: Sequence[Path] = FILES
) -> dict[str, list[str]]:
    """What `check` says against each file; all of it, so that one run shows what to mend."""
    said = {path.relative_to(PACKAGE).as_posix(): sorted(check(path)) for path in paths}
    return {where: words for where, words in said.items() if words}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def module_of(path: Path) -> str:
    """`geoscope/linalg/svd.py` → `geoscope.linalg.svd`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below it, without the expressions in them, which are most of a tree."""
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        below = getattr(node, name, None)
        for child in below if isinstance(below, list) else ():
            yield child
            yield from statements(child)


@cache
def imports(path: Path) -> frozenset[str]:
    """Names of the imported modules; `from a import b` gives `a.b` too."""
    found: set[str] = set()
    for node in statements(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are written in full"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def wing(module: str) -> str:
    """The part of the house: `geoscope.linalg.svd` → `linalg`, `geoscope` → ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


# What each wing may import of the others (docs/architecture.md). `` is geoscope/__init__.py, from
# which nothing is taken.
FLOOR = {
    *(
        "_version",
        "answers",
        "arguments",
        "digits",
        "errors",
        "files",
        "folders",
        "foreign",
        "kinds",
    ),
    *("names", "patterns", "pattern_server", "profile", "records", "thresholds"),
}
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "digits": set(),
    "errors": set(),
    "profile": set(),
    "files": set(),
    "folders": {"arguments", "errors"},
    "thresholds": {"errors"},
    "answers": {"thresholds"},
    "kinds": {"answers"},
    "arguments": {"errors"},
    "foreign": {"errors"},
    "pattern_server": set(),
    "patterns": {"errors"},
    "names": {"arguments", "errors", "patterns"},
    "records": {"arguments", "digits", "errors", "foreign", "names"},
    "linalg": FLOOR,
    "engine": {"linalg", *FLOOR},
    "metrics": {"linalg", *FLOOR},
    "trajectory": {"linalg", *FLOOR},
    "adapters": {"linalg", *FLOOR},
    "formats": FLOOR,
    "models": {"formats", *FLOOR},
    "outputs": {"formats", "models", *FLOOR},
    "peft": {"formats", "models", *FLOOR},
    "sources": {"formats", "models", "outputs", "peft", *FLOOR},
    "report": FLOOR,
    "demo": FLOOR,
    "verbs": {
        *("formats", "models", "outputs", "peft", "sources"),
        *("engine", "metrics", "trajectory", "adapters", "linalg"),
        *FLOOR,
    },
    "integrations": {"verbs", "sources", *FLOOR},
    "cli": {"verbs", "report", "integrations", "demo", *FLOOR},
    "__main__": {"cli", *FLOOR},
}
# Taken across the arrows, each for its reason.
EXCEPTIONS = {
    # the commands name metrics and codes without running them
    ("cli", "geoscope.metrics"),
    # a report shows and saves itself: its methods call the renderers, loaded then
    ("records", "geoscope.report"),
}
MODULES = {module_of(path) for path in FILES}
WINGS = {wing(module) for module in MODULES} - {""}


def crossings(path: Path) -> Iterator[str]:
    """Imports of other wings of the package."""
    own = wing(module_of(path))
    for name in imports(path):
        if name.startswith("geoscope.") and wing(name) in WINGS - {own}:
            yield name


def is_excepted(own: str, name: str) -> bool:
    return any(
        own == who and (name == what or name.startswith(f"{what}.")) for who, what in EXCEPTIONS
    )


def arrows_up(path: Path) -> Iterator[str]:
    own = wing(module_of(path))
    if own == "":
        return  # the front door names them all, and loads none: see below
    for name in crossings(path):
        if wing(name) not in ALLOWED[own] and not is_excepted(own, name):
            yield name


def test_arrows_point_down_only() -> None:
    assert offenders(arrows_up) == {}


def test_the_drawing_is_free_of_cycles_and_names_every_wing() -> None:
    assert set(ALLOWED) >= WINGS
    height: dict[str, int] = {}

    def climb(name: str, seen: tuple[str, ...] = ()) -> int:
        assert name not in seen, f"{name} stands above itself: {seen}"
        if name not in height:
            below = [climb(one, (*seen, name)) for one in ALLOWED[name]]
            height[name] = 1 + max(below, default=-1)
        return height[name]

    for name in ALLOWED:
        climb(name)
    assert height["errors"] == 0
    assert height["__main__"] == max(height.values())


def test_every_exception_is_used() -> None:
    """So that none outlives its reason."""
    used = {
        (own, what)
        for path in FILES
        for name in crossings(path)
        for own, what in EXCEPTIONS
        if own == wing(module_of(path)) and (name == what or name.startswith(f"{what}."))
    }
    assert used == EXCEPTIONS


@pytest.mark.parametrize("name", ["sources", "metrics", "report"])
def test_sources_metrics_and_report_do_not_know_one_another(name: str) -> None:
    others = {"sources", "metrics", "report"} - {name}
    for path in FILES:
        if wing(module_of(path)) == name:
            assert not others & {wing(one) for one in crossings(path)}, path


WITHOUT_TORCH = [path for path in FILES if wing(module_of(path)) in {*FLOOR, "report", "cli", ""}]


def of_torch(path: Path) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] == "torch"]


def test_nouns_reports_and_commands_know_no_torch() -> None:
    assert WITHOUT_TORCH
    assert offenders(of_torch, WITHOUT_TORCH) == {}


@pytest.mark.parametrize(
    "module", ["errors", "kinds", "records", "names", "report", "cli", "__main__"]
)
def test_importing_them_loads_no_torch(module: str) -> None:
    code = f"import sys, geoscope.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- who factorises, who prints -----------------------------------------------------------------

FACTORISATIONS = {
    *("svd", "svdvals", "eig", "eigvals", "eigh", "eigvalsh", "qr", "cholesky", "lu", "lu_factor"),
    *("svd_lowrank", "pca_lowrank", "lobpcg", "matrix_rank", "pinv", "lstsq", "geqrf", "symeig"),
    *("eigh_tridiagonal", "eigvalsh_tridiagonal"),
}


def factorisations(path: Path) -> set[str]:
    """Calls of torch.linalg, numpy.linalg, scipy.linalg and torch that factorise."""
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    names |= {call.id for call in calls if isinstance(call, ast.Name)}
    return names & FACTORISATIONS


def test_only_linalg_factorises() -> None:
    outside = [path for path in FILES if wing(module_of(path)) != "linalg"]
    assert offenders(factorisations, outside) == {}


def test_the_probe_sees_factorisations() -> None:
    assert {"svd", "svdvals", "qr"} <= set().union(*map(factorisations, FILES))


def words_outside(path: Path) -> Iterator[str]:
    """Uses of print, stdout and stderr, which belong to cli/output.py and the error boundary."""
    allowed = path.relative_to(PACKAGE).as_posix() in ("cli/output.py", "__main__.py")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield f"line {node.lineno}: print"
        if isinstance(node, ast.Attribute) and not allowed:
            if (stream := ast.unparse(node)) in ("sys.stdout", "sys.stderr"):
                yield f"line {node.lineno}: {stream}"


def test_nothing_is_printed() -> None:
    assert offenders(words_outside) == {}


SWITCHES = (
    *("basicConfig", "torch.manual_seed(", "random.seed(", "allow_tf32", "matplotlib.pyplot"),
    *("matplotlib.use(", "os.environ[", "os.putenv", "import click"),
)


def switches(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [word for word in SWITCHES if word in text]


def test_no_switch_is_thrown_at_import() -> None:
    """No logging set-up, global seed, TF32 switch or environment write; a backend is not chosen."""
    assert offenders(switches) == {}


def test_every_file_says_what_it_is_for() -> None:
    assert offenders(lambda path: [] if ast.get_docstring(tree(path)) else ["no docstring"]) == {}


# --- names that may be used ---------------------------------------------------------------------


def defined(path: Path) -> tuple[set[str], set[str]]:
    """Public functions, classes and constants made here; names that are imported here."""
    made: set[str] = set()
    taken: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Assign):
            made.update(
                one.id
                for target in node.targets
                for one in ast.walk(target)
                if isinstance(one, ast.Name)
            )
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            made.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            taken.update(alias.asname or alias.name for alias in node.names)
    return {name for name in made if not name.startswith("_")}, taken


def listed(path: Path) -> list[str] | None:
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, Classes, functions, each by the alphabet, as the linter sorts them."""

    def rank(name: str) -> tuple[int, str]:
        kind = 0 if name.isupper() else 1 if name[:1].isupper() else 2
        return kind, name

    return sorted(names, key=rank)


def faults_of_list(path: Path) -> Iterator[str]:
    names = listed(path)
    made, taken = defined(path)
    if names is None:
        if made:
            yield f"no __all__ for {sorted(made)}"
        return
    if names != in_order(names):
        yield f"__all__ is not in the order {in_order(names)}"
    if len(names) != len(set(names)):
        yield "__all__ names something twice"
    if module_of(path) != "geoscope":
        yield from (f"__all__ names {name}" for name in set(names) - made - taken)


def test_every_list_of_public_names_is_sorted_and_exists() -> None:
    assert offenders(faults_of_list) == {}


@cache
def uses() -> set[tuple[str, str]]:
    """(module, name) of everything that one file of the package takes from another."""
    found = set()
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("geoscope"):
                found.update((str(node.module), alias.name) for alias in node.names)
    return found


def taken_unlisted(path: Path) -> set[str]:
    module = module_of(path)
    taken = {name for where, name in uses() if where == module and f"{where}.{name}" not in MODULES}
    return taken - {"__version__"} - set(listed(path) or ())


def test_what_others_import_is_listed() -> None:
    """Complete: a name that another file takes stands in __all__ (submodules need not)."""
    assert offenders(taken_unlisted) == {}


PUBLIC = {
    *("METRICS", "GeoscopeError", "Interrupted", "LayerRecord", "Options", "Progress"),
    *("Report", "Status", "read_report", "write_report", "open_adapter", "open_checkpoint"),
    *("inspect", "collapse", "anisotropy", "alignment", "compare", "capacity", "measure"),
    *("FollowOptions", "follow", "extrapolate"),
    *("LineageOptions", "lineage"),
    *("InitOptions", "LoraFactors", "geora", "init_adapter", "initialise", "verify_adapter"),
    "convert_adapter",
}


def test_the_front_door_offers_these_names_and_no_others() -> None:
    assert set(geoscope.__all__) == PUBLIC
    assert dir(geoscope) == sorted([*PUBLIC, "__version__"])
    for name in PUBLIC:
        assert getattr(geoscope, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", geoscope.__version__)
    with pytest.raises(AttributeError, match="no attribute 'compute'"):
        _ = geoscope.compute  # pyright: ignore[reportAttributeAccessIssue]


def test_the_front_door_opens_without_torch() -> None:
    code = "import sys, geoscope; geoscope.Report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == PUBLIC
    assert (PACKAGE / "py.typed").exists()


# --- the tree of errors -------------------------------------------------------------------------


def raised_on_purpose() -> dict[str, type[BaseException]]:
    """Every exception class that the package defines."""
    found: dict[str, type[BaseException]] = {}
    for path in FILES:
        if module_of(path) == "geoscope.__main__":
            continue
        names = [node.name for node in tree(path).body if isinstance(node, ast.ClassDef)]
        module = importlib.import_module(module_of(path)) if names else None
        for name in names:
            one = getattr(module, name, None)  # None: for type checkers alone
            if inspect.isclass(one) and issubclass(one, BaseException):
                found[name] = one
    return found


def test_the_docstring_draws_the_tree_of_errors() -> None:
    text = errors.__doc__ or ""
    drawn: dict[str, str] = {}  # name → its parent
    parents = {0: ""}
    for line in text.splitlines():
        match = re.fullmatch(r"( *)(?:[+-] )?([A-Z]\w+?)(?: {2,}.*)?", line)
        if match is None:
            continue
        depth, name = len(match.group(1)), match.group(2)
        parents[depth] = name
        drawn[name] = parents[max((one for one in parents if one < depth), default=0)]
    drawn["GeoscopeError"] = drawn["Stopped"] = ""
    made = {
        name: one
        for name, one in vars(errors).items()
        if inspect.isclass(one)
        and issubclass(one, BaseException)
        and one.__module__ == errors.__name__
    }
    assert set(drawn) == set(made)
    for name, parent in drawn.items():
        base = made[name].__bases__[0]
        assert (base.__name__ if parent else base) in (parent, Exception, BaseException)
        if parent:
            assert issubclass(made[name], made[parent])


def test_every_error_of_the_package_is_a_geoscope_error() -> None:
    """So that the one boundary of the command line catches it; a signal is not an error."""
    found = raised_on_purpose()
    assert len(found) >= 9
    for name, one in found.items():
        assert issubclass(one, errors.GeoscopeError) != (name == "Stopped"), name


def swallowed(path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield f"line {node.lineno}: a bare except"
        elif ast.unparse(node.type) in ("Exception", "BaseException"):
            text = "".join(ast.unparse(part) for part in node.body)
            passed_on = "raise" in text or "done.put" in text
            if not passed_on and "#" not in lines[node.lineno - 1]:
                yield f"line {node.lineno}: {ast.unparse(node.type)} without a reason"


def test_no_exception_is_swallowed_without_a_reason() -> None:
    assert offenders(swallowed) == {}


# --- circles and sizes ----------------------------------------------------------------------------


def modules_used(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, for type checkers too."""
    return {name for name in imports(path) if name in MODULES} - {module_of(path)}


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module_of(path): modules_used(path) for path in FILES if path.name != "__init__.py"}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


# Tables of data, read from top to bottom.
TABLES = {"answers.py", "kinds.py", "metrics/table.py"}
LONGEST_FILE, LONGEST_BODY, USUAL_BODY = 500, 60, 16


def bodies(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of each function, without its head and docstring."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, (node.end_lineno or 0) - first[0].lineno + 1 if first else 0


def test_functions_are_short() -> None:
    lengths = sorted(length for path in FILES for _, length in bodies(path))
    assert lengths[int(0.9 * len(lengths))] <= USUAL_BODY
    long = {
        f"{path.relative_to(PACKAGE)}:{name}": length
        for path in FILES
        for name, length in bodies(path)
        if length > LONGEST_BODY
    }
    assert long == {}


def test_files_are_short() -> None:
    lines = {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for path in FILES
    }
    assert {at: n for at, n in lines.items() if n > LONGEST_FILE and at not in TABLES} == {}


# --- the tests ----------------------------------------------------------------------------------

TESTS = Path(__file__).parent
TEST_MODULES = sorted(TESTS.rglob("test_*.py"))


def test_the_tests_stand_in_the_folders_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TEST_MODULES}
    homes = (PACKAGE, PACKAGE.parent / "benchmarks")
    lost = {path.as_posix() for path in folders if not any((at / path).is_dir() for at in homes)}
    assert lost == {"bad"}  # the corpus, for all of them


def test_no_test_module_imports_another() -> None:
    """What several of them need stands in tests/helpers."""
    shared = {
        path.relative_to(TESTS).as_posix(): sorted(names)
        for path in TESTS.rglob("*.py")
        if (names := {name for name in imports(path) if re.search(r"(^|\.)test_", name)})
    }
    assert shared == {}


def names_taken(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every name that a file imports from the package."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("geoscope"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_benchmarks_and_examples_import_what_there_is() -> None:
    """They are run by hand, so that a name that moved would be found out late."""
    root = PACKAGE.parent
    files = [path for name in ("benchmarks", "examples") for path in (root / name).rglob("*.py")]
    taken = {pair for path in files for pair in names_taken(path)}
    assert len(taken) > 40  # the probe sees what is there
    assert [pair for pair in sorted(taken) if not is_there(*pair)] == []


def is_there(module: str, name: str) -> bool:
    return hasattr(importlib.import_module(module), name) or (
        importlib.util.find_spec(f"{module}.{name}") is not None
    )
