"""What lies in huggingface_hub's own cache, and how do whole files get there?"""

from __future__ import annotations

import re
from pathlib import Path

from geoscope.errors import HubError
from geoscope.files import keep
from geoscope.foreign import shown, small_text
from geoscope.sources.hub.errors import hub_errors
from geoscope.sources.hub.progress import OnDownload, quiet_download

__all__ = ["cache_of", "cached_commit", "download", "in_cache", "is_commit", "remember"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[\w-][\w.-]{0,199}")
_TIMEOUT = 30.0


def cache_of(repo: str) -> Path:
    """The folder of a model in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def remember(repo: str, revision: str, commit: str) -> None:
    """Note the commit of a branch in the cache, as downloads by branch name do.

    Our downloads name the commit, so nothing else would, and the model could not be found offline.
    """
    if revision == commit or not _stays_inside(revision):
        return
    keep(cache_of(repo) / "refs" / revision, commit.encode())


def cached_commit(repo: str, revision: str) -> str | None:
    """The commit that a revision had when it was last seen; None where it never was."""
    if is_commit(revision):
        return revision
    if not _stays_inside(revision):
        return None
    try:
        commit = small_text(cache_of(repo) / "refs" / revision).strip()
    except OSError:
        return None
    return commit if is_commit(commit) else None


def is_commit(text: str) -> bool:
    """Whether it is the full hash of a commit, and so a plain name of a folder too."""
    return _COMMIT.fullmatch(text) is not None


def _stays_inside(revision: str) -> bool:
    """Names of branches come from a server, and become paths here."""
    return all(part not in ("", ".", "..") for part in revision.split("/"))


def in_cache(repo: str, commit: str, path: str) -> Path | None:
    """A whole file on this disk, None when it is not there."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo, path, revision=commit)
    return Path(cached) if isinstance(cached, str) else None


def download(repo: str, commit: str, path: str, size: int, report: OnDownload | None) -> Path:
    """A whole file, fetched when it is not here. Raises CheckpointError."""
    cached = in_cache(repo, commit, path)
    if cached is not None:
        return cached
    with hub_errors(repo, commit, path.rpartition("/")[2]):
        _check_etag(repo, commit, path)
        return quiet_download(repo, path, commit, size, report)


def _check_etag(repo: str, commit: str, path: str) -> None:
    """Raises HubError for an ETag that is no plain name: a file of the cache is called by it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    etag = get_hf_file_metadata(hf_hub_url(repo, path, revision=commit), timeout=_TIMEOUT).etag
    if etag is not None and _ETAG.fullmatch(etag) is None:
        raise HubError(
            f"{path} of {repo}@{commit}: its ETag {shown(etag)} is no name of a file; "
            "check HF_ENDPOINT and the proxy"
        )
