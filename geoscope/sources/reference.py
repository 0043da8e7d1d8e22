"""What does the user's argument name: something on this disk, or a model on the Hub?

    path/to/dir · file.safetensors                an existing path wins over every other reading
    org/name[@revision]                           Hub model: branch, tag, commit or refs/pr/7
    hf://org/name[@revision][/sub/folder]         the same with a sub-folder; %2F for a slash in
                                                  a branch, refs/pr/N and refs/convert/* keep theirs

    base+adapter                                  two of these: the base with the adapter over it

A name without a slash is only ever a path. Nothing here touches the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from geoscope.errors import CheckpointNotFound, OptionError
from geoscope.foreign import exists, local_path

__all__ = [
    "GRAMMAR",
    "HubReference",
    "LocalReference",
    "Reference",
    "base_and_adapter",
    "elsewhere",
    "parse_reference",
]

GRAMMAR = (
    "write PATH, org/name[@revision], hf://org/name[@revision][/sub/folder], or two of these as "
    "base+adapter"
)

_HUB = "hf://"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_REPO = re.compile(rf"{_PART}/{_PART}")
_SPECIAL_REVISION = re.compile(r"refs/(?:pr|convert)/[^/]+")
# What git forbids in the name of a reference, and a path that would climb out of a folder.
_NO_REVISION = re.compile(r"\.\.|(?:^|/)\.|[\s~^:?*\[\\\x00-\x1f]|^/|/$|//")
_OTHER_REPOS = ("datasets", "spaces", "kernels", "buckets")


@dataclass(frozen=True)
class LocalReference:
    """An existing file or folder."""

    given: str
    path: Path


@dataclass(frozen=True)
class HubReference:
    """A model on the Hub; `revision` None is the main branch, `folder` "" the root."""

    given: str
    repo: str
    revision: str | None = None
    folder: str = ""


Reference = LocalReference | HubReference


def base_and_adapter(reference: str) -> tuple[str, str] | None:
    """The two references of `base+adapter`; None for anything else.

    An existing path wins over this reading, and each + that leaves two references is taken for the
    mark, the first of several; else it may stand in a revision. Raises OptionError for neither.
    """
    if "+" not in reference or exists(local_path(reference)):
        return None
    marks = [place for place, letter in enumerate(reference) if letter == "+"]
    for place in marks:
        base, adapter = reference[:place], reference[place + 1 :]
        if _is_reference(base) and _is_reference(adapter):
            return base, adapter
    if _is_reference(reference):
        return None
    shown = reference if reference.isprintable() else repr(reference)
    raise OptionError(
        f"{shown}: neither a path nor base+adapter: one side of the + is not a folder, a file or a "
        f"Hub id; {GRAMMAR}"
    )


def elsewhere(reference: str, commit: str | None = None) -> str:
    """The same model for another process: a path from the root, a Hub id at its commit.

    Raises what `parse_reference` does.
    """
    pair = base_and_adapter(reference)
    if pair is not None:
        return "+".join(map(elsewhere, pair))
    named = parse_reference(reference)
    if isinstance(named, LocalReference):
        return str(named.path.absolute())
    if commit is None:
        return reference
    return f"{_HUB}{named.repo}@{commit}" + (f"/{named.folder}" if named.folder else "")


def _is_reference(text: str) -> bool:
    try:
        parse_reference(text)
    except (CheckpointNotFound, OptionError):
        return False
    return True


def parse_reference(reference: str) -> Reference:
    """What `reference` names. Raises OptionError (grammar) or CheckpointNotFound (no such path)."""
    if not reference.strip():
        raise OptionError(f"the reference to a model is empty; {GRAMMAR}")
    on_the_hub = reference.startswith(_HUB)
    path = local_path(reference)
    if not on_the_hub and exists(path):
        return LocalReference(reference, path)
    if not reference.isprintable():
        raise CheckpointNotFound(
            f"{reference!r}: no such file or folder, and no Hub id either: {GRAMMAR}"
        )
    if on_the_hub:
        return _hub_uri(reference)
    if _looks_like_a_path(reference):
        raise CheckpointNotFound(f"{reference}: no such file or folder")
    return _hub_name(reference)


def _looks_like_a_path(reference: str) -> bool:
    return reference.startswith((".", "/", "~")) or "\\" in reference or reference.endswith("/")


def _hub_name(reference: str) -> HubReference:
    """`org/name[@revision]`; the revision may hold slashes."""
    if "://" in reference:
        raise OptionError(f"{reference}: a URL is not a reference to a model; {GRAMMAR}")
    if reference.count("@") > 1:
        raise OptionError(f"{reference}: more than one @; {GRAMMAR}")
    repo, at, revision = reference.partition("@")
    if "/" not in repo:
        raise CheckpointNotFound(
            f"{reference}: no such file or folder, and no Hub id either: {GRAMMAR}"
        )
    if repo.count("/") > 1 and not at:
        raise CheckpointNotFound(
            f"{reference}: no such file or folder; a sub-folder on the Hub is written "
            "hf://org/name/sub/folder"
        )
    return _hub_reference(reference, repo, revision if at else None, "")


def _hub_uri(reference: str) -> HubReference:
    body = reference.removeprefix(_HUB).strip("/")
    kind = body.split("/", 1)[0]
    if kind in _OTHER_REPOS:
        raise OptionError(f"{reference}: {kind} hold no models; {GRAMMAR}")
    repo, at, rest = body.partition("@")
    if not at or repo.count("/") > 1:  # an @ behind the repository is part of a folder's name
        org, _, rest = body.partition("/")
        name, _, folder = rest.partition("/")
        return _hub_reference(reference, f"{org}/{name}", None, folder)
    special = _SPECIAL_REVISION.match(rest)
    revision = special.group() if special else rest.partition("/")[0]
    folder = rest[len(revision) :].strip("/")
    return _hub_reference(reference, repo, unquote(revision), folder)


def _hub_reference(reference: str, repo: str, revision: str | None, folder: str) -> HubReference:
    if not _REPO.fullmatch(repo):
        raise OptionError(f"{reference}: {repo!r} is not an org/name; {GRAMMAR}")
    if revision is not None and (not revision or "@" in revision or _NO_REVISION.search(revision)):
        raise OptionError(f"{reference}: {revision!r} is not a revision; {GRAMMAR}")
    if any(part in ("", ".", "..") for part in folder.split("/")) and folder:
        raise OptionError(f"{reference}: {folder!r} is not a sub-folder; {GRAMMAR}")
    return HubReference(reference, repo, revision, folder)
