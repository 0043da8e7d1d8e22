"""Is every spelling of a model either understood or refused in one line, whatever it holds?

Against a reading of the grammar of its own, written with `str` methods where the code has regular
expressions.
"""

from __future__ import annotations

import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from geoscope.errors import CheckpointError, GeoscopeError, OptionError
from geoscope.sources.reference import (
    GRAMMAR,
    HubReference,
    LocalReference,
    base_and_adapter,
    parse_reference,
)

HEAD = string.ascii_letters + string.digits + "_"
PART = st.builds(str.__add__, st.sampled_from(HEAD), st.text(HEAD + ".-", max_size=12))
# What git takes as the name of a branch or tag, without what the grammar gives a meaning.
WORD = st.text(HEAD + ".-+=,!#$%&'é", min_size=1, max_size=12).filter(
    lambda one: ".." not in one and not one.startswith(".")
)
BRANCH = st.lists(WORD, min_size=1, max_size=3).map("/".join)
PLAIN = st.text(HEAD + ".-é ", min_size=1, max_size=10).filter(lambda one: one.strip(". "))
FOLDER = st.lists(PLAIN, max_size=3).map("/".join)
SPECIAL = st.one_of(
    st.integers(0, 10**6).map("refs/pr/{}".format),
    st.sampled_from(["refs/convert/parquet", "refs/convert/onnx"]),
)
# Anything, with the marks of the grammar more often than chance would bring them.
TEXT = st.lists(
    st.one_of(
        st.sampled_from(["hf://", "/", "@", "..", ".", "%2F", "%2E%2E", "~", "+", "*", ":", "\\",
                         "org/name", "refs/pr/7", "\n", "\x00", " ", "datasets/", "https://"]),
        st.text(max_size=6),
    ),
    max_size=8,
).map("".join)  # fmt: skip

quick = settings(max_examples=300, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _empty_folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    """So that nothing that is drawn exists by chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


def is_safe(reference: HubReference) -> bool:
    """Whether paths made of its parts stay below the folder that they are joined to."""
    org, slash, name = reference.repo.partition("/")
    parts = [org, name, *(reference.revision or "x").split("/")]
    parts += reference.folder.split("/") if reference.folder else []
    unsafe = any(part in ("", ".", "..") or "\x00" in part for part in parts)
    return bool(slash) and "/" not in name and not unsafe


@quick
@given(TEXT)
@example("hf://org/name@%2e%2e/x")
@example("hf://org/name@a%2F..%2Fb")
@example("hf://org/name@a%00b")
@example("hf://org/name/%2e%2e/x")
@example("org/name@.")
@example("hf://org/name@.")
@example("hf://org/name@a/./b")
@example("org/name@a/.")
@example("~no-such-user/x")
@example("a\nb/c")
@example("hf://org/name\n")
@example("org/name@\x85")
@example("\x00")
@example("a/" * 3000)
def test_anything_is_understood_or_refused_in_one_line(text: str) -> None:
    try:
        found = parse_reference(text)
    except GeoscopeError as error:
        assert isinstance(error, OptionError | CheckpointError)
        assert str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert found.given == text
        if isinstance(found, HubReference):
            assert is_safe(found)
        else:
            assert Path(text).expanduser().exists()


@quick
@given(PART, PART, st.none() | BRANCH)
def test_a_name_with_a_revision(org: str, name: str, revision: str | None) -> None:
    text = f"{org}/{name}" if revision is None else f"{org}/{name}@{revision}"
    assume("+" not in name)
    assert parse_reference(text) == HubReference(text, f"{org}/{name}", revision)


@quick
@given(PART, PART, st.none() | BRANCH, FOLDER)
def test_a_uri_reads_back_what_was_written(
    org: str, name: str, revision: str | None, folder: str
) -> None:
    assume(org not in ("datasets", "spaces", "kernels", "buckets"))
    at = "" if revision is None else f"@{quote(revision, safe='')}"
    below = f"/{folder}" if folder else ""
    text = f"hf://{org}/{name}{at}{below}"
    assert parse_reference(text) == HubReference(text, f"{org}/{name}", revision, folder)


@quick
@given(PART, PART, SPECIAL, FOLDER)
def test_pull_requests_and_conversions_keep_their_slashes(
    org: str, name: str, revision: str, folder: str
) -> None:
    assume(org not in ("datasets", "spaces", "kernels", "buckets"))
    text = f"hf://{org}/{name}@{revision}" + (f"/{folder}" if folder else "")
    assert parse_reference(text) == HubReference(text, f"{org}/{name}", revision, folder)


@quick
@given(PART, PART, BRANCH, BRANCH)
def test_more_than_one_at_is_refused(org: str, name: str, one: str, other: str) -> None:
    with pytest.raises(OptionError, match="more than one @"):
        parse_reference(f"{org}/{name}@{one}@{other}")


@quick
@given(PLAIN)
def test_a_name_without_a_slash_is_only_ever_a_path(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        parse_reference(name)
    path = Path(name)
    path.mkdir()
    try:
        assert parse_reference(name) == LocalReference(name, path)
    finally:
        path.rmdir()


@pytest.mark.parametrize(
    "text",
    ["org/name@", "hf://org/name@", "hf://org/name@a..b", "org/name@a b", "org/name@-/../x",
     "hf://org", "hf://", "hf:///name", "hf://org/name//x/../y", "hf://org/name@main/..",
     "hf://datasets/org/name", "https://huggingface.co/org/name"],
)  # fmt: skip
def test_what_is_refused_quotes_the_grammar(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_reference(text)
    assert GRAMMAR in str(caught.value)


def test_an_existing_path_wins() -> None:
    path = Path("org/name")
    path.mkdir(parents=True)
    try:
        assert parse_reference("org/name") == LocalReference("org/name", path)
        assert isinstance(parse_reference("hf://org/name"), HubReference)
    finally:
        path.rmdir()
        path.parent.rmdir()


# --- base+adapter -------------------------------------------------------------------------------

REVISION = st.none() | BRANCH.filter(lambda one: "+" not in one)
ORG = PART.filter(lambda one: one not in ("datasets", "spaces", "kernels", "buckets"))


def named(org: str, name: str, revision: str | None) -> str:
    return f"{org}/{name}" if revision is None else f"{org}/{name}@{revision}"


def uri(org: str, name: str, revision: str | None) -> str:
    return f"hf://{named(org, name, None if revision is None else quote(revision, safe=''))}"


NAMED = st.builds(named, PART, PART, REVISION)
URI = st.builds(uri, ORG, PART, REVISION)


@quick
@given(NAMED | URI, NAMED | URI)
def test_base_and_adapter_are_the_two_sides_of_the_mark(base: str, adapter: str) -> None:
    assert base_and_adapter(f"{base}+{adapter}") == (base, adapter)
    assert base_and_adapter(base) is None


@quick
@given(TEXT)
@example("+")
@example("org/base+")
@example("+org/adapter")
@example("org/base++org/adapter")
@example("org/base+no-such-folder")
def test_what_has_the_mark_is_two_references_or_refused_in_one_line(text: str) -> None:
    try:
        found = base_and_adapter(text)
    except GeoscopeError as error:
        assert isinstance(error, OptionError)
        assert len(str(error).splitlines()) == 1
        assert "+" in text
        return
    if found is None:
        return
    assert "+".join(found) == text
    for one in found:
        parse_reference(one)


def test_folders_on_both_sides_and_a_path_with_the_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "lora", "a+b"):
        (tmp_path / name).mkdir()
    assert base_and_adapter("base+lora") == ("base", "lora")
    assert base_and_adapter(f"{tmp_path}/base+./lora") == (f"{tmp_path}/base", "./lora")
    assert base_and_adapter("a+b") is None, "an existing path wins"
    assert base_and_adapter("a+b+lora") == ("a+b", "lora")
    assert base_and_adapter("org/name@v1+cu12") is None, "part of a revision"
    with pytest.raises(OptionError, match="not a folder, a file or a Hub id"):
        base_and_adapter("base+other")
