"""What a terminal shows while the work goes on, and a pipe does not."""

from __future__ import annotations

import io
import re
import sys

import pytest

from geoscope.cli.output import progress
from geoscope.verbs.options import Planned, Progress

NAME = "model.layers.17.self_attn.q_proj.weight"
PLAN = Planned("base", "tuned", 28, "cpu", 0, None, ())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def do(told: Progress) -> None:
    """A download, a plan, some matrices, and a remark between them."""
    told.on_download("model.safetensors", 30_000_000, 120_000_000)
    told.on_plan(PLAN)
    told.on_pair(3, 28, NAME)
    told.on_note("a remark")
    told.on_pair(28, 28, NAME)
    told.on_plan(PLAN)  # of the next model
    told.on_pair(1, 28, NAME)


def said(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, quiet: bool = False) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    with progress(quiet=quiet) as told:
        do(told)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")


def test_a_terminal_shows_what_is_done_how_much_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = said(monkeypatch, Terminal())
    fetching = re.search(
        r"fetching model.safetensors +\S+ 30 of 120 MB +(-:--:--|\d:\d\d:\d\d)", text
    )
    assert fetching, text
    assert re.search(r"matrices +\S+ 3 of 28 +\S+ …\S*q_proj.weight", text), text
    assert re.search(r"matrices +\S+ 1 of 28 ", text), text
    for words in ("comparing 28 matrices of tuned with base on cpu", "note: a remark"):
        assert re.search(rf"^{words}$", text, re.MULTILINE), "a line of its own"


def test_a_pipe_shows_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "comparing 28 matrices of tuned with base on cpu\n"
    assert said(monkeypatch, io.StringIO()) == f"{line}note: a remark\n{line}"
    assert said(monkeypatch, Terminal(), quiet=True) == ""
