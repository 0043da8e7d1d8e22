"""Servers that are no Hub: a page of a proxy, cut or deep JSON, fields of any type: one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from geoscope.errors import CheckpointError
from geoscope.sources.hub.branches import branches
from geoscope.sources.open import open_checkpoint

COMMIT = "a" * 40
GOOD: dict[str, Any] = {
    "id": "org/name", "sha": COMMIT, "lastModified": "2026-01-01T00:00:00.000Z",
    "siblings": [{"rfilename": "config.json", "size": 2}],
}  # fmt: skip


def with_file(**file: Any) -> bytes:
    return json.dumps(
        {**GOOD, "siblings": [{"rfilename": "config.json", "size": 2, **file}]}
    ).encode()


ANSWERS = {
    "a page": b"<html><body>Log in to the hotel's network</body></html>",
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"3",
    "no object": b"{}",
    "cut": json.dumps(GOOD).encode()[:60],
    "deep": b"[" * 100_000,
    "no utf-8": b"\xff\xfe{}",
    "a long number": b'{"sha": ' + b"9" * 5000 + b"}",
    "sha is a list": json.dumps({**GOOD, "sha": [COMMIT]}).encode(),
    "sha is a number": json.dumps({**GOOD, "sha": 7}).encode(),
    "sha climbs": json.dumps({**GOOD, "sha": "../../x"}).encode(),
    "siblings is a text": json.dumps({**GOOD, "siblings": "x"}).encode(),
    "siblings of null": json.dumps({**GOOD, "siblings": [None]}).encode(),
    "siblings without names": json.dumps({**GOOD, "siblings": [{"size": 1}]}).encode(),
    "a date": json.dumps({**GOOD, "lastModified": {"a": 1}}).encode(),
    "no date": json.dumps({**GOOD, "lastModified": "yesterday"}).encode(),
    "a name is a number": with_file(rfilename=3),
    "a name climbs": with_file(rfilename="../../config.json"),
    "a name is a path": with_file(rfilename="/etc/passwd"),
    "a name steers": with_file(rfilename="\x1b[2Jconfig.json"),
    "a name is long": with_file(rfilename="x" * 5000),
    "a size is a text": with_file(size="2"),
    "a size is negative": with_file(size=-1),
    "a size is large": with_file(size=10**30),
}


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What the Hub of this process answers to everything, with status 200."""
    from huggingface_hub import constants

    told: list[bytes] = [b""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(told[0])))
            self.end_headers()
            self.wfile.write(told[0])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield told
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("body", ANSWERS.values(), ids=ANSWERS)
def test_an_odd_answer_is_told_in_one_line(answer: list[bytes], body: bytes) -> None:
    answer[0] = body
    for ask in (lambda: open_checkpoint("org/name"), lambda: branches("org/name", "step*")):
        with pytest.raises(CheckpointError) as caught:
            ask()
        said = str(caught.value)
        assert "org/name" in said and "\n" not in said and len(said) < 600
        assert said.isprintable()


ETAGS = ["../../../evil", "a/b", "..", ".", "a" * 300, "a\\b"]


@pytest.mark.parametrize("etag", ETAGS)
def test_an_etag_that_is_no_name_never_reaches_the_cache(
    monkeypatch: pytest.MonkeyPatch, etag: str
) -> None:
    import huggingface_hub

    from geoscope.sources.hub import cache

    class TextAnswer:
        pass

    TextAnswer.etag = etag  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: TextAnswer)
    monkeypatch.setattr(cache, "in_cache", lambda *_: None)
    monkeypatch.setattr(cache, "quiet_download", lambda *_: pytest.fail("it was fetched"))
    with pytest.raises(CheckpointError, match="is no name of a file"):
        cache.download("org/name", COMMIT, "config.json", 2, None)
