"""Which branches of a Hub model fit a pattern? One request; offline, the refs of the cache."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from geoscope.errors import CheckpointNotFound, first_names
from geoscope.names import in_natural_order
from geoscope.sources.hub.errors import hub_errors

__all__ = ["branches"]


def branches(repo: str, pattern: str) -> list[str]:
    """Names of the branches of `repo` that fit a shell pattern, in natural order.

    Raises CheckpointNotFound when none does, CheckpointError when the Hub does not answer.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    known = _cached(repo) if offline else _listed(repo)
    fitting = in_natural_order(name for name in known if fnmatchcase(name, pattern))
    if not fitting:
        listed = first_names(in_natural_order(known), 8) or "none"
        where = " (offline: only cached branches are known)" if offline else ""
        raise CheckpointNotFound(
            f"no branch of {repo} matches {pattern!r}{where}; there are: {listed}"
        )
    return fitting


def _listed(repo: str) -> list[str]:
    from huggingface_hub import HfApi

    with hub_errors(repo, "refs"):
        return [str(branch.name) for branch in HfApi().list_repo_refs(repo).branches]


def _cached(repo: str) -> list[str]:
    """Branches whose commit the cache knows."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo, repo_type="model")
    refs = Path(constants.HF_HUB_CACHE) / folder / "refs"
    return [path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()]
