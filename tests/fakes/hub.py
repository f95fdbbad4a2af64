"""A fake Hugging Face hub, with its CDN on another port, and with configurable faults.

It answers the requests that huggingface_hub 2.4 sends to list a repository (`GET /api/models/…?blobs=true` and
`…/tree/COMMIT`) and to download files (`HEAD` and `GET /…/resolve/…`, with a redirect to the CDN for LFS files), in the
hub's shapes, and records them.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 4_096


@dataclass(frozen=True)
class Repo:
    """`files` maps paths to contents. With `gated`, reading them requires that token; `lfs` serves them from the CDN.

    `sizes` are reported instead of the real ones.
    """

    files: Mapping[str, bytes]
    gated: str | None = None
    lfs: bool = True
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Faults:
    """Faults in serving files; all may be changed while the hub runs."""

    cut_after: int | None = None
    """Bytes after which the connection is closed …"""
    cuts: int = 1_000_000
    """… and how often that happens."""
    hang_after: int | None = None
    """Bytes after which nothing more is sent, with the connection left open."""
    bytes_per_second: float | None = None
    refuse_ranges: bool = False
    flip: bool = False
    """Whether the first byte sent is corrupted."""
    login_page: bool = False
    """Whether every response is a web page, as from the login page of a hotel network."""
    cdn: str | None = None
    """Where files are redirected to instead of the CDN."""
    moved: str | None = None
    """Where requests to list a repository are redirected to."""
    statuses: list[int] = field(default_factory=list)
    """Status codes for the next requests, whatever they are."""


@dataclass(frozen=True)
class Request:
    """`server` is `hub` or `cdn`; `range` and `authorization` are the headers."""

    server: str
    method: str
    path: str
    range: str | None
    authorization: str | None


class FakeHub:
    """Runs until the end of its `with` block. `repos` may change while it runs."""

    def __init__(self, repos: Mapping[str, Repo]) -> None:
        self.repos = dict(repos)
        self.faults = Faults()
        self.requests: list[Request] = []
        self.sent = 0
        self.closing = threading.Event()
        self._hub, self._cdn = _Server(self, "hub"), _Server(self, "cdn")

    @property
    def url(self) -> str:
        return self._hub.url

    @property
    def cdn_url(self) -> str:
        return self._cdn.url

    @property
    def cdn_host(self) -> str:
        """Host of the CDN. It is on this machine, so it must be among the hosts that downloads may be redirected to."""
        return self._cdn.url.removeprefix("http://")

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def requests_to(self, server: str) -> list[Request]:
        return [request for request in self.requests if request.server == server]

    def content(self, sha256: str) -> bytes | None:
        contents = (content for repo in self.repos.values() for content in repo.files.values())
        return next((content for content in contents if hashlib.sha256(content).hexdigest() == sha256), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them: no thread outlives a test

    def __init__(self, hub: FakeHub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.name = name
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors of clients that disconnect in mid-transfer: the tests do that on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # like the real one; else each answer waits 40 ms for an acknowledgement
    server: _Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(
            Request(self.server.name, self.command, path, self.headers["Range"], self.headers["Authorization"])
        )
        if hub.faults.statuses:
            self._refuse(hub.faults.statuses.pop(0), "ServerError", "the fake was told to refuse")
        elif hub.faults.login_page:
            self._answer(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        elif self.server.name == "cdn":
            content = hub.content(path.rpartition("/")[2])
            if content is None:
                self._refuse(403, "AccessDenied", "no such object")
            else:
                self._send(content)
        elif path.startswith("/api/") and hub.faults.moved is not None:
            self._answer(307, b"", {"Location": hub.faults.moved})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._list(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._refuse(404, "NotFound", "the fake does not have this page")

    def _list(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, revision)
        if repo is None:
            return
        siblings = []
        for path, content in repo.files.items():
            size = repo.sizes.get(path, len(content))
            entry: dict[str, object] = {"rfilename": path, "size": size, "blobId": git_id(content)}
            if repo.lfs:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 135}
            siblings.append(entry)
        body = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, revision)
        if repo is None:
            return
        entries = []
        for path, content in repo.files.items():
            size = repo.sizes.get(path, len(content))
            entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": git_id(content)}
            if repo.lfs:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 135}
            entries.append(entry)
        self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id, revision)
        if repo is None:
            return
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if repo.gated is not None and token != repo.gated:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        elif path not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif repo.lfs:
            content = repo.files[path]
            sha256 = hashlib.sha256(content).hexdigest()
            cdn = self.server.hub.faults.cdn or self.server.hub.cdn_url
            headers = {
                "Location": f"{cdn}/repos/{quote(sha256)}?signature=short-lived",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{sha256}"',
            }
            self._answer(302, b"", headers)
        else:
            self._send(repo.files[path])

    def _repo(self, repo_id: str, revision: str) -> Repo | None:
        """The repository; None after an error response, which is the hub's (401 without a token)."""
        repo = self.server.hub.repos.get(repo_id)
        if repo is None and self.headers["Authorization"] is None:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        elif repo is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def _send(self, content: bytes) -> None:
        faults = self.server.hub.faults
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "X-Repo-Commit": COMMIT,
        }
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(asked[1]) if asked and not faults.refuse_ranges else 0
        if start >= len(content) > 0:
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        rest = content[start:] if self.command == "GET" else b""
        if faults.flip and rest:
            rest = bytes([rest[0] ^ 0xFF]) + rest[1:]
        sent = 0
        for piece in self._paced(rest):
            self.wfile.write(piece)
            sent += len(piece)
            self.server.hub.sent += len(piece)
            if faults.hang_after is not None and sent >= faults.hang_after:
                self.server.hub.closing.wait(30)
                self.close_connection = True
                return
            if faults.cut_after is not None and sent >= faults.cut_after and faults.cuts > 0:
                faults.cuts -= 1
                self.close_connection = True
                return

    def _paced(self, content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            yield piece
            if self.server.hub.faults.bytes_per_second is not None:
                time.sleep(len(piece) / self.server.hub.faults.bytes_per_second)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def git_id(content: bytes) -> str:
    """The id that git gives a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
