"""A stand-in for the Hub's HTTP interface, for tests that download through huggingface_hub.

    with HubServer({"org/name": Repo({"config.json": b"{}"})}) as hub:
        ...  # HF_ENDPOINT=hub.url

Speaks what the client asks: revisions, paged trees, refs, resolve with ETag and X-Repo-Commit, a
redirect of large files to another host, ranges, and the error codes of missing, private and gated
repositories. It shows that the client accepts the answers, not that the Hub gives the same ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 1000  # bytes from which on a file is stored elsewhere
PAGE = 2  # entries of a tree in one answer
Files = Mapping[str, bytes]


@dataclass
class Repo:
    """`files` is the main branch; `branches` holds others, by name. `gated` asks for consent."""

    files: Files
    branches: Mapping[str, Files] = field(default_factory=dict)
    gated: bool = False

    def revisions(self) -> dict[str, Files]:
        named = {"main": self.files, **self.branches}
        return {**named, **{commit_of(files): files for files in named.values()}}


def commit_of(files: Files) -> str:
    """The commit: a hash of all names and contents."""
    return oid(repr(sorted((name, oid(content)) for name, content in files.items())).encode())


class DeviceCopy(NamedTuple):
    """A body that went out, and the range that was asked for."""

    path: str
    range: str
    nbytes: int


@dataclass
class Failure(Exception):
    status: int
    code: str = ""


class HubServer:
    """Serves `repos` on a free port of the loopback. Everything may be changed while it runs.

    Large files lie in a store of their own, on another host and port.

    log: (method, path, lower-case headers) of each request. sent: each body that went out.
    drop: files whose next whole body breaks off half way.
    cut: file → after how many bytes each of its next ranges breaks off.
    fail: path → status, for every request of it.
    busy: path → the statuses of the next ones, 0 for a true answer.
    ignore_range: answer with whole files.
    sha: the commit that is named, in place of the true one.
    told: headers in place of the true ones. told_after: those from the next cut on.
    """

    def __init__(self, repos: Mapping[str, Repo]) -> None:
        self.repos = dict(repos)
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.drop: set[str] = set()
        self.sent: list[DeviceCopy] = []
        self.cut: dict[str, list[int]] = {}
        self.fail: dict[str, int] = {}
        self.busy: dict[str, list[int]] = {}
        self.told: dict[str, str] = {}
        self.told_after: dict[str, str] = {}
        self.ignore_range = False
        self.sha = ""
        self.blobs: dict[str, tuple[str, bytes]] = {}
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        hub, store = self._servers
        self.url = f"http://127.0.0.1:{hub.server_port}"
        self.storage = f"http://localhost:{store.server_port}"

    def bodies(self, part: str) -> int:
        """Bytes of the bodies that went out for paths with `part` in them."""
        return sum(one.nbytes for one in self.sent if part in one.path)

    def __enter__(self) -> HubServer:
        self._threads = [
            threading.Thread(target=one.serve_forever, args=(0.05,)) for one in self._servers
        ]
        for one, thread in zip(self._servers, self._threads, strict=True):
            one.daemon_threads = True
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one, thread in zip(self._servers, self._threads, strict=True):
            one.shutdown()
            thread.join()
            one.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.log.append((self.command, self.path, headers))
        try:
            self._route()
        except Failure as failure:
            self._send(failure.status, b"{}", {"X-Error-Code": failure.code})

    def _route(self) -> None:
        path = urlsplit(self.path).path
        if failing := [wanted for wanted in self.hub.fail if wanted in path]:
            raise Failure(self.hub.fail[failing[0]])
        if busy := [wanted for wanted, left in self.hub.busy.items() if wanted in path and left]:
            if status := self.hub.busy[busy[0]].pop(0):
                raise Failure(status)
        if match := re.fullmatch(r"/blobs/(\w+)", path):
            name, content = self.hub.blobs[match[1]]
            self._send_content(name, content, {"ETag": f'"{match[1]}"'})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            self._json(self._refs(self._repo(match[1])))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._tree(*self._files(match[1], match[2]), unquote(match[3] or ""))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._json(self._info(match[1], *self._files(match[1], match[2] or "main")))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], unquote(match[3]))
        else:
            raise Failure(404)

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None:  # the Hub says 401 for what is private, and for what is not there
            raise Failure(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        return repo

    def _files(self, name: str, revision: str) -> tuple[str, Files]:
        files = self._repo(name).revisions().get(unquote(revision))
        if files is None:
            raise Failure(404, "RevisionNotFound")
        return commit_of(files), files

    def _info(self, name: str, commit: str, files: Files) -> dict[str, Any]:
        siblings = [{"rfilename": path, "size": len(files[path])} for path in files]
        sha = self.hub.sha or commit
        return {"id": name, "sha": sha, "siblings": siblings, "gated": self._repo(name).gated}

    def _refs(self, repo: Repo) -> dict[str, Any]:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(files)}
            for name, files in {"main": repo.files, **repo.branches}.items()
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def _tree(self, commit: str, files: Files, folder: str) -> None:
        paths = sorted(path for path in files if path.startswith(folder))
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        entries = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": oid(files[path])}
            for path in paths[start : start + PAGE]
        ]
        rest = f"{self.hub.url}{self.path.split('?')[0]}?recursive=true&cursor={start + PAGE}"
        link = {"Link": f'<{rest}>; rel="next"'} if start + PAGE < len(paths) else {}
        self._json(entries, link)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if self._repo(name).gated:
            raise Failure(403, "GatedRepo")
        commit, files = self._files(name, revision)
        if path not in files:
            raise Failure(404, "EntryNotFound")
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid(content)}"'}
        if len(content) < LARGE:
            return self._send_content(path, content, headers)
        blob = hashlib.sha256(content).hexdigest()
        self.hub.blobs[blob] = (path, content)
        linked = {"X-Linked-ETag": f'"{blob}"', "X-Linked-Size": str(len(content))}
        headers |= {**linked, "Location": f"{self.hub.storage}/blobs/{blob}"}
        return self._send(302, b"", headers)

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), headers or {})

    def _send_content(self, name: str, content: bytes, headers: Mapping[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.hub.ignore_range:
            return self._send(200, content, headers, name)
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        span = f"bytes {start}-{end}/{len(content)}"
        return self._send(206, content[start : end + 1], {**headers, "Content-Range": span}, name)

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], name: str | None = None
    ) -> None:
        self.send_response(status)
        told = {key: value for key, value in self.hub.told.items() if key in headers}
        for key, value in {"Content-Length": str(len(body)), **headers, **told}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.drop and status == 200:
            self.hub.drop.remove(name)
            body = body[: len(body) // 2]
            self.close_connection = True
        if name is not None and status == 206 and self.hub.cut.get(name):
            body = body[: self.hub.cut[name].pop(0)]
            self.hub.told |= self.hub.told_after
            self.close_connection = True
        self._send_body(body)

    def _send_body(self, body: bytes) -> None:
        count = 0
        try:
            for start in range(0, len(body), 1 << 16):
                count += self.wfile.write(body[start : start + (1 << 16)])
        except ConnectionError:  # the client has what it wanted
            self.close_connection = True
        self.hub.sent.append(DeviceCopy(self.path, self.headers.get("Range", ""), count))


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
