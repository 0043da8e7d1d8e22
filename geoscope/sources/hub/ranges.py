"""How do some bytes of a file on the Hub get here, over a connection that may break?

    HEAD  org/name/resolve/<commit>/<file>     → commit, ETag, size, and where the bytes lie
    GET   there, Range: bytes=a-b              → 206, Content-Range: bytes a-b/size

Every answer is checked against what was asked and against the answers before. After a break the
next request starts at the byte where it broke. Addresses, login and session are huggingface_hub's;
the login goes to the Hub's own host alone, never to a store that it redirects to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from geoscope.errors import CheckpointError
from geoscope.sources.hub.errors import hub_errors, is_passing

__all__ = ["RemoteFile"]

_TIMEOUT = 30.0
_ATTEMPTS = 7  # in a row without a single byte
_FIRST_WAIT = 0.25  # seconds, then twice as long each time
_VALID = 600.0  # seconds that an address is used


@dataclass(frozen=True)
class _Answer:
    """Where the bytes lie. The address may be signed, and valid for an hour only."""

    url: str
    asked: float


@dataclass
class RemoteFile:
    """One file of a repository at one commit, of `size` bytes by the listing."""

    repo: str
    commit: str
    path: str
    size: int
    _answer: _Answer | None = field(default=None, repr=False)
    _etag: str | None = field(default=None, repr=False)

    def read(
        self, begin: int, end: int, keep: Callable[[bytes], None], *, passing: int = 0
    ) -> bool:
        """Hands bytes begin … end − 1 to `keep`, in pieces and in their order.

        False when the server answers with the whole file and more than `passing` bytes would come
        in vain before the first one that is wanted; then nothing was handed on.
        Raises CheckpointError, or what `keep` raises.
        """
        position, failures = begin, 0
        with hub_errors(self.repo, self.commit, self.path):
            while position < end:
                start = position
                try:
                    with self._stream(position, end, passing) as chunks:
                        if chunks is None:
                            return False
                        for chunk in chunks:
                            keep(chunk)
                            position += len(chunk)
                    broken: Exception | None = None
                except Exception as error:
                    if not is_passing(error):
                        raise
                    broken = error
                failures = 0 if position > start else failures + 1
                if failures == _ATTEMPTS:
                    raise broken or self._wrong("no bytes")
                if position < end:
                    self._answer = None  # another store may answer
                    time.sleep(_FIRST_WAIT * 2 ** max(0, failures - 1))
        return True

    @contextmanager
    def _stream(self, begin: int, end: int, passing: int) -> Iterator[Iterator[bytes] | None]:
        """The bytes from `begin` on, `end` at the most; None for a server without ranges."""
        url, headers = self._address()
        asked = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with _get(url, {**headers, **asked}) as (status, told, chunks):
            if told.get("content-encoding", "identity") != "identity":
                raise self._wrong(f"the encoding {told['content-encoding']}")
            if status == 200:
                yield None if begin > passing else _between(chunks, begin, end - begin)
                return
            span = f"bytes {begin}-{end - 1}/{self.size}"
            if status != 206 or told.get("content-range") != span:
                found = told.get("content-range", "no Content-Range")
                raise self._wrong(f"status {status}, {found!r}, for {span!r}")
            yield _between(chunks, 0, end - begin)

    def _address(self) -> tuple[str, dict[str, str]]:
        """Where the bytes lie, and the headers for there."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        hub = hf_hub_url(self.repo, self.path, revision=self.commit)
        if self._answer is None or time.monotonic() - self._answer.asked > _VALID:
            self._answer = self._ask(hub)
        headers = build_hf_headers()
        if urlsplit(self._answer.url)[:2] != urlsplit(hub)[:2]:
            headers.pop("authorization", None)
        return self._answer.url, headers

    def _ask(self, url: str) -> _Answer:
        from huggingface_hub import get_hf_file_metadata

        found = get_hf_file_metadata(url, timeout=_TIMEOUT)
        if found.commit_hash != self.commit:
            raise self._wrong(f"the commit {found.commit_hash}")
        if found.size != self.size:
            raise self._wrong(f"{found.size} bytes, where its listing says {self.size}")
        if self._etag is not None and found.etag != self._etag:
            raise self._wrong("another ETag than before: the file was changed meanwhile")
        self._etag = found.etag
        return _Answer(found.location, time.monotonic())

    def _wrong(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} of {self.repo}@{self.commit}: the server answered with {found}; "
            "retry, or check HF_ENDPOINT and the proxy"
        )


def _between(chunks: Iterator[bytes], passed: int, wanted: int) -> Iterator[bytes]:
    """`wanted` bytes at the most, behind the first `passed`."""
    for chunk in chunks:
        kept = chunk[passed : passed + wanted]
        passed -= min(passed, len(chunk))
        wanted -= len(kept)
        if kept:
            yield kept
        if not wanted:
            return


@contextmanager
def _get(
    url: str, headers: Mapping[str, str]
) -> Iterator[tuple[int, Mapping[str, str], Iterator[bytes]]]:
    """Status, headers in lower case and body of an answer that is not an error."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    session: Any = get_session()
    with session.stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()  # the words of the error are taken from it
        hf_raise_for_status(response)
        told = {str(key).lower(): str(value) for key, value in response.headers.items()}
        yield response.status_code, told, response.iter_raw()
