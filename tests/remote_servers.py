"""Servers of remote text on 127.0.0.1 that fail on demand: S3 (moto), a web server,
the APIs of the Hub and of Google Cloud Storage.

Each has `faults`, which every request passes:

    server.faults.queue += ["503", "cut"]     the next two reads fail so
    server.faults.rate = 0.05                 one read in twenty fails, by a fixed seed
    server.faults.latency_s = 0.05            every answer waits

A fault is a status ("429" comes with Retry-After: 0), "cut" (the connection ends in the middle of
the body), "short" (a body that ends early and says so) or "slow" (bytes drip).
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTSECRETKEYID",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/test-secret-access-key",
    "HF_TOKEN": "hf_testSecretTokenOfTheHub",
}
"""Credentials of the servers; no file and no message may hold one."""
SIGNATURE = "Signature=of-a-signed-redirect"
SLOW_BYTES = 1 << 10  # between two pauses of a slow answer
SLOW_PAUSE_S = 0.02


@dataclass
class Faults:
    """Which requests fail, and how."""

    queue: list[str] = field(default_factory=list)
    """Faults of the next reads, used up one by one."""
    rate: float = 0.0
    kinds: tuple[str, ...] = ("429", "500", "503", "cut", "short")
    latency_s: float = 0.0
    all_requests: bool = False
    """Whether listings and HEAD requests fail too."""
    requests: list[str] = field(default_factory=list)
    """Method, path and range of each request."""

    def __post_init__(self) -> None:
        self._draw, self._lock = random.Random(0), threading.Lock()

    def next(self, method: str, path: str, bytes_range: str) -> str:
        """Waits, writes the request down and returns its fault, or ''."""
        time.sleep(self.latency_s)
        with self._lock:
            self.requests.append(" ".join((method, path, bytes_range)).rstrip())
            if not (self.all_requests or (method == "GET" and bytes_range)):
                return ""
            if self.queue:
                return self.queue.pop(0)
            return self._draw.choice(self.kinds) if self._draw.random() < self.rate else ""

    @property
    def reads(self) -> list[str]:
        """The requests for a range of a file."""
        return [request for request in self.requests if "bytes=" in request]


class WebServer:
    """Files by path ("text/a.parquet"), with ranges, ETag, If-Match and an HTML page per folder."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults = Faults()
        self.has_ranges = self.has_index = self.has_if_match = True
        self.forbidden = False
        server = self

        class Handler(_Handler):
            site = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Ends the server; later requests are refused by the system."""
        self._server.shutdown()
        self._server.server_close()

    def respond(self, request: _Handler, path: str) -> None:
        """Answers a GET or HEAD request."""
        if self.forbidden:
            request.answer(403)
        elif path in self.files:
            request.send_file(self.files[path])
        elif self.has_index and (path == "" or path.endswith("/")):
            inside = {name[len(path) :] for name in self.files if name.startswith(path)}
            names = sorted({name.split("/")[0] + "/" * ("/" in name) for name in inside})
            links = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
            page = f'<html><a href="?C=N;O=D">Name</a> <a href="../">up</a>\n{links}</html>'
            request.answer(200 if names else 404, page.encode(), {"Content-Type": "text/html"})
        elif self.has_index and any(name.startswith(f"{path}/") for name in self.files):
            request.answer(301, headers={"Location": f"/{path}/"})
        else:
            request.answer(404)


class _Handler(BaseHTTPRequestHandler):
    site: WebServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests' output clean."""

    def do_GET(self) -> None:  # noqa: N802
        self._fault = self.site.faults.next(self.command, self.path, self.headers.get("Range", ""))
        if self._fault.isdigit():
            self.answer(int(self._fault), headers={"Retry-After": "0"})
        else:
            self.site.respond(self, unquote(urlsplit(self.path).path).lstrip("/"))

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def send_file(self, data: bytes) -> None:
        tag = f'"{hashlib.sha1(data).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes" if self.site.has_ranges else "none"}
        wanted = self.headers.get("Range", "")
        if self.site.has_if_match and self.headers.get("If-Match", tag) != tag:
            self.answer(412)
        elif wanted and self.site.has_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(len(data), int(last) + 1)
            if start >= len(data):
                self.answer(416)
                return
            if self._fault == "moved":
                start, stop = start + 1, stop + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self.answer(206, data[start:stop], headers)
        else:
            self.answer(200, data, headers)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Sends an answer whole, or as the fault of this request wants it."""
        cut = body[: len(body) // 2]
        length = len(cut if self._fault == "short" else body)
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault == "slow":
            for start in range(0, len(body), SLOW_BYTES):
                self.wfile.write(body[start : start + SLOW_BYTES])
                time.sleep(SLOW_PAUSE_S)
            return
        self.wfile.write(cut if self._fault in ("cut", "short") else body)
        self.close_connection |= self._fault == "cut"


class HubServer(WebServer):
    """Dataset repositories as the Hub serves them, reads by a signed redirect to another host.

    `commit` adds a commit to main; every request but those of the redirect needs HF_TOKEN.
    """

    repo = "owner/name"

    def __init__(self) -> None:
        super().__init__()
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Returns the id of a new commit with these files by path."""
        sha = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def respond(self, request: _Handler, path: str) -> None:
        """Answers a request of the API, or for a file."""
        if path.startswith("cdn/"):
            self._send_signed(request, path)
            return
        if request.headers.get("Authorization") != f"Bearer {SECRETS['HF_TOKEN']}":
            request.answer(401, headers={"X-Error-Code": "GatedRepo"})
            return
        # Split first: a slash in the name of a branch is quoted.
        quoted = urlsplit(request.path).path.lstrip("/").removeprefix("api/")
        parts = [unquote(part) for part in quoted.split("/")]
        repo, kind, (revision, *rest) = (
            "/".join(parts[1:3]),
            "".join(parts[3:4]),
            (parts[4:] or ["main"]),
        )
        sha = self.branches.get(revision, revision)
        if repo != self.repo or sha not in self.commits:
            code = "RevisionNotFound" if repo == self.repo else "RepoNotFound"
            request.answer(404, headers={"X-Error-Code": code})
        elif kind == "resolve" and "/".join(rest) not in self.commits[sha]:
            request.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        elif kind == "resolve":
            target = f"http://localhost:{self.port}/cdn/{sha}/{'/'.join(rest)}?{SIGNATURE}"
            request.answer(302, headers={"Location": target})
        elif kind == "tree":
            whole = "recursive=true" in request.path
            self._send_json(request, self._tree(self.commits[sha], "/".join(rest), whole))
        else:
            self._send_json(request, {"id": repo, "sha": sha, "siblings": []})

    def _send_signed(self, request: _Handler, path: str) -> None:
        assert "Authorization" not in request.headers, "the token must not leave the Hub"
        _, sha, name = path.split("/", 2)
        found = SIGNATURE in request.path and self.commits.get(sha, {}).get(name)
        if found:
            request.send_file(found)
        else:
            request.answer(403)

    def _tree(self, files: dict[str, bytes], folder: str, whole: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(name for name in files if name.startswith(prefix)):
            inner = name[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                path = prefix + "/".join(inner[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": "0" * 40}
            oid = hashlib.sha1(files[name]).hexdigest()
            entries[name] = {"type": "file", "path": name, "size": len(files[name]), "oid": oid}
        return [each for path, each in entries.items() if whole or "/" not in path[len(prefix) :]]

    def _send_json(self, request: _Handler, value: Any) -> None:
        if value == []:
            request.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            request.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


class GcsServer(WebServer):
    """Objects of one bucket, by the JSON API of Google Cloud Storage; a write is a generation."""

    def respond(self, request: _Handler, path: str) -> None:
        """Answers a request for a listing, for an object's entry or for its bytes."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
        _, _, key = path.partition("/o/")
        prefix = asked.get("prefix", "")
        answer: dict[str, Any] = {
            "items": [self._entry(name) for name in self.files if name.startswith(prefix)]
        }
        if key:
            entry = self._entry(key) if key in self.files else None
            if entry is None or asked.get("generation", entry["generation"]) != entry["generation"]:
                request.answer(404)
                return
            if asked.get("alt") == "media":
                request.send_file(self.files[key])
                return
            answer = entry
        request.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        return {"name": name, "size": str(len(data)), "generation": str(zlib.crc32(data))}


class S3Server:
    """moto's S3 behind the same faults; `put` fills a bucket."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *args: object) -> None:
                pass

        self.faults = Faults()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._respond, threaded=True, request_handler=Quiet
        )
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _respond(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = self.faults.next(method, path, environ.get("HTTP_RANGE", ""))
        if fault.isdigit():
            code = {"403": "AccessDenied", "404": "NoSuchKey"}.get(fault, "InternalError")
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            start(f"{fault} Fault", [("Content-Length", str(len(body))), ("Retry-After", "0")])
            return [body]
        body = b"".join(self._moto(environ, start))
        return [body[: len(body) // 2]] if fault in ("cut", "short") else [body]

    def put(self, bucket: str, files: dict[str, bytes], **options: str) -> None:
        """Writes files by key; the bucket is made if it is not there. options: of put_object."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")
        client.create_bucket(Bucket=bucket)
        for key, data in files.items():
            client.put_object(Bucket=bucket, Key=key, Body=data, **options)
        client.close()

    def stop(self) -> None:
        """Ends the server; later requests are refused by the system."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web_server() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.stop()


@pytest.fixture
def gcs_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    """The Google Cloud Storage of this process and its children, without credentials."""
    server = GcsServer()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    yield server
    server.stop()


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process and its children, by HF_ENDPOINT, with a token in HF_TOKEN."""
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    server = S3Server()  # moto is imported once: it takes a second
    yield server
    server.stop()


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 of this process and its children, by AWS_ENDPOINT_URL, with a key pair; buckets of
    earlier tests are still there."""
    s3_process.faults = Faults()
    for name, value in {
        "AWS_ENDPOINT_URL": s3_process.url,
        "AWS_ACCESS_KEY_ID": SECRETS["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": SECRETS["AWS_SECRET_ACCESS_KEY"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return s3_process
