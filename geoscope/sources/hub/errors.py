"""What went wrong on the Hub, in one line each.

Subclasses stand before their bases: GatedRepoError is a RepositoryNotFoundError, that and
RevisionNotFoundError are HfHubHTTPErrors, LocalEntryNotFoundError is an EntryNotFoundError and an
OSError. A token is in none of the lines, and no URL keeps its query, which can be a signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import cast

from geoscope.errors import (
    CheckpointError,
    CheckpointNotFound,
    GeoscopeError,
    HubError,
    HubNotFound,
    OptionError,
)
from geoscope.sources.reference import GRAMMAR

__all__ = ["hub_errors", "is_passing", "not_cached"]

# What huggingface_hub raises where it takes an answer apart.
_NO_HUB = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_BUSY = (408, 429, 500, 502, 503, 504)


@contextmanager
def hub_errors(
    repo: str, at: str, file: str = "", *, branches: Callable[[], str] | None = None
) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of geoscope.

    `at` is the revision or commit, `file` the file that was wanted; `branches` lists the branches
    of the repository, for the line about a revision that does not exist.
    """
    from huggingface_hub import errors

    what = f"{file} of {repo}@{at}" if file else f"{repo}@{at}"
    # Failures to connect have no base of huggingface_hub's own, but share httpx's with its errors.
    network = cast("tuple[type[Exception], ...]", (*errors.HfHubHTTPError.__bases__, OSError))
    try:
        yield
    except GeoscopeError:
        raise
    except errors.GatedRepoError:
        raise HubNotFound(
            f"{repo} is gated. Accept the terms at https://huggingface.co/{repo} "
            "and log in (`hf auth login`)."
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubNotFound(
            f"{repo} not found, or private. No local path of that name either."
        ) from None
    except errors.RevisionNotFoundError:
        listed = branches() if branches is not None else ""
        raise HubNotFound(
            f"no revision {at} in {repo}" + (f"; branches: {listed}" if listed else "")
        ) from None
    except errors.OfflineModeIsEnabled:
        raise not_cached(what, file) from None
    except errors.LocalEntryNotFoundError as error:
        raise _not_here(error, what, file) from None
    except errors.EntryNotFoundError:
        raise HubNotFound(f"{what} is not on the Hub") from None
    except errors.HFValidationError:
        raise OptionError(f"{repo!r} is not an org/name; {GRAMMAR}") from None
    except network as error:
        raise _transport(error, what, file) from None
    except _NO_HUB:  # a page of a proxy, JSON of another form, numbers that are none
        raise _no_hub(what) from None


def is_passing(error: Exception) -> bool:
    """Whether a request that failed so may succeed when it is repeated."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in _BUSY
    # The last base that the library of connections gives, httpx.HTTPError.
    carriers = ("httpx", "httpx2")
    of_carriers = [
        one for one in errors.HfHubHTTPError.__mro__ if one.__module__.split(".")[0] in carriers
    ]
    return isinstance(error, of_carriers[-1])


def _not_here(error: Exception, what: str, file: str) -> CheckpointError:
    """huggingface_hub says "not cached" for a Hub that did not answer, too: look at the cause."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(cause, Exception) and not isinstance(cause, errors.OfflineModeIsEnabled):
        return _transport(cause, what, file)
    return not_cached(what, file)


def not_cached(what: str, file: str = "") -> CheckpointNotFound:
    """`what` is a file of a repository, or the repository, whose name may be a mistyped path."""
    local = "" if file else " No local path of that name either."
    return CheckpointNotFound(f"offline, and {what} is not cached.{local}")


def _transport(error: Exception, what: str, file: str) -> CheckpointError:
    """Status and URL of an answer that was an error, or the failure to get any answer."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    if response is not None:
        url = str(getattr(response, "url", "")).split("?")[0]
        return HubError(
            f"{what}: HTTP {response.status_code} from {url}; {_remedy(response.status_code)}"
        )
    if isinstance(error, errors.FileMetadataError):
        return _no_hub(what)
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return HubError(f"{what}: {error.strerror}; make room or fix the access, and retry")
    first = (str(error).splitlines() or [""])[0].split("?")[0]
    detail = shorten(f"{type(error).__name__}: {first}", 120, placeholder="…").rstrip(": ")
    local = "" if file else "no local path of that name, and "
    return HubError(
        f"{what}: {local}the connection to the Hub failed ({detail}); retry, or set HF_ENDPOINT, "
        "or set HF_HUB_OFFLINE=1 to use what is cached"
    )


def _no_hub(what: str) -> HubError:
    return HubError(
        f"{what}: the server does not answer as a Hub does; check HF_ENDPOINT and the proxy"
    )


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "the login is not accepted: log in again (`hf auth login`)"
    if status == 429:
        return "too many requests: wait a few minutes and retry"
    if status == 416:
        return "the file there is shorter than its listing says: retry"
    return "retry, or set HF_ENDPOINT"
