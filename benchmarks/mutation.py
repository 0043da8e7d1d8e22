"""How many small faults in the code do its tests see? A seeded sample of mutants, one at a time.

A mutant changes one place of a module of linalg, metrics, trajectory or adapters: a comparison, an
operator, a number, `and` for `or`, a `not` that is gone, two arguments in the wrong order. The
quick tests of the module's folder run over it in a copy of the tree: the files that name most of
what the module offers; a survivor meets those of WIDER, too, and then the slow tests of the same
files. A mutant whose tests need more than
--limit seconds of the processor is told apart: it may be caught, or slow. Each run is a fork of one
process that has imported torch, so that a mutant costs its tests alone. Prints Markdown; with --log
also after each mutant.

    python -m benchmarks.mutation [--mutants 48] [--first 0] [--seed 0] [--seconds 720] [--log FILE]
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("linalg", "metrics", "trajectory", "adapters")
FILES = 4  # of tests, those that name most of what the module offers
# Where the numbers of a wing are held against an oracle as a whole.
WIDER = {"linalg": ("tests/test_agreement.py",), "metrics": ("tests/test_agreement.py",)}
NO_TESTS = 5
CAUGHT, SLOWLY, TIMEOUT, SURVIVED = "caught", "by slow tests", "no end", "survived"
# Times the limit that slow tests may take.
_SLOW = 4
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A module with one place changed: the `number`-th of its nodes, before and after."""

    module: Path
    number: int
    before: ast.expr
    after: ast.AST

    def __str__(self) -> str:
        before, after = ast.unparse(self.before), ast.unparse(self.after)
        return f"{self.module.as_posix()}:{self.before.lineno}: `{before}` → `{after}`"

    def source(self) -> str:
        """All of the module."""
        tree = ast.parse((ROOT / self.module).read_text("utf-8"))
        holder, name, i, _ = list(_expressions(tree))[self.number]
        _put(holder, name, i, self.after)
        return ast.unparse(tree)


def mutated(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            new.ops = [_COMPARISONS[type(operator)]()]
        case ast.BinOp(op=operator) if type(operator) in _OPERATORS:
            new.op = _OPERATORS[type(operator)]()
        case ast.BoolOp():
            new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        case ast.UnaryOp(op=ast.Not()):
            new = new.operand
        case ast.Constant(value=bool()):
            new.value = not new.value
        case ast.Constant(value=int() | float()):
            new.value += 1 if isinstance(new.value, int) else new.value or 1.0
        case ast.Call(args=[ast.expr() as first, ast.expr() as second, *rest]) if not any(
            isinstance(part, ast.Starred) for part in (first, second)
        ):
            new.args = [second, first, *rest]
        case _:
            return
    yield new


def _skipped(tree: ast.AST) -> set[int]:
    """Nodes that say nothing at run time: annotations, and what an error says."""
    parts: list[ast.AST | None] = []
    for node in ast.walk(tree):
        match node:
            case ast.arg() | ast.AnnAssign():
                parts.append(node.annotation)
            case ast.FunctionDef():
                parts.append(node.returns)
            case ast.Raise() | ast.JoinedStr() | ast.Subscript(value=ast.Name(id="Literal")):
                parts.append(node)
    return {id(inner) for part in parts if part is not None for inner in ast.walk(part)}


def mutants_of(module: Path) -> Iterator[Mutant]:
    """All of one module, in the order of its lines."""
    tree = ast.parse((ROOT / module).read_text("utf-8"))
    skipped = _skipped(tree)
    for number, (*_, node) in enumerate(_expressions(tree)):
        if id(node) not in skipped:
            yield from (Mutant(module, number, node, new) for new in mutated(node))


def _expressions(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int, ast.expr]]:
    """Each with the field that holds it, and its place in it."""
    for holder in ast.walk(tree):
        for name, value in ast.iter_fields(holder):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(node, ast.expr):
                    yield holder, name, i, node


def _put(holder: ast.AST, name: str, i: int, node: ast.AST) -> None:
    value = getattr(holder, name)
    if isinstance(value, list):
        value[i] = node
    else:
        setattr(holder, name, node)


def sample(count: int, seed: int) -> list[Mutant]:
    """So many, the wings in turn; each place of a wing is as likely as any other."""
    rng, drawn = random.Random(seed), list[list[Mutant]]()
    for wing in WINGS:
        modules = sorted((ROOT / "geoscope" / wing).rglob("*.py"))
        sites = [m for module in modules for m in mutants_of(module.relative_to(ROOT))]
        drawn.append(rng.sample(sites, min(len(sites), -(-count // len(WINGS)))))
    return [mutant for turn in zip(*drawn, strict=True) for mutant in turn][:count]


# --- running ------------------------------------------------------------------------------------


def tests_of(mutant: Mutant) -> list[list[str]]:
    """Arguments of pytest, one run after the other."""
    wing = mutant.module.parts[1]
    tests = sorted((ROOT / "tests" / wing).glob("test_*.py"))
    named = {path: _mentions(path.read_text("utf-8"), mutant.module) for path in tests}
    best = sorted((path for path in tests if named[path]), key=lambda path: -named[path])[:FILES]
    runs = [[path.relative_to(ROOT).as_posix() for path in best], list(WIDER.get(wing, ()))]
    return [run for run in runs if run]


def _mentions(text: str, module: Path) -> int:
    """How often a text names a module, or what stands in its `__all__`."""
    source = (ROOT / module).read_text("utf-8")
    offered = re.search(r"__all__ = \[(.*?)\]", source, re.DOTALL)
    names = re.findall(r'"(\w+)"', offered[1]) if offered else []
    return sum(len(re.findall(rf"\b{name}\b", text)) for name in (module.stem, *names))


def outcome(mutant: Mutant, folder: Path, limit: float) -> str:
    """What the tests say of the mutant."""
    target = folder / mutant.module
    before = target.read_text("utf-8")
    target.write_text(mutant.source(), "utf-8")
    try:
        for tests in tests_of(mutant):
            code = forked(tests, folder, limit, "not slow")
            if code not in (0, NO_TESTS):
                return TIMEOUT if code is None else CAUGHT
        code = forked(tests_of(mutant)[0], folder, _SLOW * limit, "slow")
        return SURVIVED if code in (None, 0, NO_TESTS) else SLOWLY
    finally:
        target.write_text(before, "utf-8")


def forked(tests: Sequence[str], folder: Path, limit: float, marks: str) -> int | None:
    """The exit code of pytest in a fork of this process; None after so many seconds of its own."""
    pid = os.fork()
    if pid == 0:
        _child(tests, folder, limit, marks)
    started = time.monotonic()
    while time.monotonic() - started < 4 * limit:  # it may wait, too
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.1)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _child(tests: Sequence[str], folder: Path, limit: float, marks: str) -> None:
    import pytest

    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (round(limit), round(limit) + 5))
    os.chdir(folder)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(path for path in sys.path if path != str(ROOT))]
    os.environ["PYTHONPATH"] = str(folder)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    options = ["-x", "-q", "-n", "0", "-m", marks, "-p", "no:cacheprovider"]
    os._exit(pytest.main([*options, *tests]))


def told(outcomes: list[tuple[Mutant, str]], seconds: float) -> str:
    hows = (CAUGHT, SLOWLY, TIMEOUT, SURVIVED)
    lines = [f"| wing | mutants | {' | '.join(hows)} |", "|---|--:|--:|--:|--:|--:|"]
    for wing in WINGS:
        counts = Counter(how for mutant, how in outcomes if mutant.module.parts[1] == wing)
        numbers = " | ".join(str(counts[how]) for how in hows)
        lines.append(f"| {wing} | {counts.total()} | {numbers} |")
    left = [mutant for mutant, how in outcomes if how == SURVIVED]
    share = sum(how in (CAUGHT, SLOWLY) for _, how in outcomes) / max(1, len(outcomes))
    lines += ["", f"{len(outcomes)} mutants in {seconds:.0f} s, {share:.0%} caught. Survivors:", ""]
    return "\n".join([*lines, *(f"- {mutant}" for mutant in left)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutants", type=int, default=48)
    parser.add_argument("--first", type=int, default=0, help="mutants of the sample to pass over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=720, help="no new mutant after them")
    parser.add_argument("--limit", type=float, default=60, help="of the processor, for one run")
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    import scipy.linalg  # noqa: F401
    import torch  # noqa: F401

    outcomes, started = list[tuple[Mutant, str]](), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("geoscope", "tests", "benchmarks", "examples", "docs"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        for mutant in sample(given.mutants, given.seed)[given.first :]:
            if time.perf_counter() - started > given.seconds:
                break
            outcomes.append((mutant, outcome(mutant, folder, given.limit)))
            if given.log is not None:
                text = told(outcomes, time.perf_counter() - started)
                given.log.write_text(f"{text}\n\n{outcomes[-1][1]}: {mutant}\n")
    print(told(outcomes, time.perf_counter() - started))


if __name__ == "__main__":
    main()
