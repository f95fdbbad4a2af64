"""HTTP, as both servers speak it: requests and answers in JSON, events, health, and what is refused.

Only the standard library is needed here, so that a server answers `/health` before the heavy packages are imported,
and can say which of them is missing.

A thread per connection reads the request, waits for its job, and cancels that when the client disconnects. Every
connection, body and wait is bounded.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty
from socketserver import TCPServer
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from errors import Cancelled, RequestError
from work import Job, Step, WorkQueue

CONNECTION_LIMIT = 64
READ_SECONDS = 10.0
"""Time in which a whole request must have arrived."""
WRITE_SECONDS = 30.0
POLL_SECONDS = 0.05
"""How often a waiting connection is checked for a client that has disconnected."""
KEEP_ALIVE_SECONDS = 15.0
LINGER_SECONDS = 2.0
"""Time given to a client to take a refusal before it has sent its whole body."""

log = logging.getLogger("local-servers")


@dataclass(frozen=True)
class Progress:
    """How far a load is; the totals are None if they aren't known."""

    stage: Literal["downloading", "loading"]
    completed_bytes: int | None = None
    total_bytes: int | None = None


class Service(Protocol):
    """What a server serves. `load` runs once, in its own thread; the routes' work runs in the work thread.

    `name` tells it from other services that answer at the same paths.
    """

    name: str
    model: str
    max_body_bytes: int

    @property
    def routes(self) -> Mapping[str, Callable[[dict[str, Any], Exchange], None]]:
        """Return what answers a POST, by path: called with the JSON body. May raise RequestError."""

    def load(self, report: Callable[[Progress], None]) -> None:
        """Load the model. An exception's text is shown to people as the cause."""

    def health(self) -> Mapping[str, object]:
        """Return at once what /health adds: `device`, `memory_bytes`, `needed_bytes`, and more."""


class Server(ThreadingHTTPServer):
    """The service's HTTP server; `state` and `error` say how its load is going."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, service: Service, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.service = service
        self.queue = WorkQueue()
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.progress: Progress | None = None
        self.error: str | None = None
        self._connections = 0
        self._ended = threading.Condition()
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks up the host's name, which hangs where the DNS is broken.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._ended:
            full = self._connections >= CONNECTION_LIMIT
            self._connections += not full
        if full:
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self._count_ended()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._count_ended()

    def _count_ended(self) -> None:
        with self._ended:
            self._connections -= 1
            self._ended.notify_all()

    def stop(self, timeout: float) -> None:
        """Cancel all work, and wait until every client has its answer, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        self.queue.close(timeout)
        with self._ended:
            self._ended.wait_for(lambda: self._connections == 0, max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        if not isinstance(sys.exc_info()[1], OSError):  # a client that disconnected is no error
            log.exception("A connection failed")

    def load(self) -> bool:
        """Load the service's model; return whether that succeeded."""
        started = time.monotonic()

        def report(progress: Progress) -> None:
            self.progress = progress

        try:
            self.service.load(report)
        except BaseException as error:  # also SystemExit of a library: the load is over either way
            self.error = str(error) or type(error).__name__
            self.state, self.progress = "failed", None
            log.exception("Loading %s failed", self.service.model)
            return False
        self.state, self.progress = "ready", None
        log.info("%s is ready after %.1f s", self.service.model, time.monotonic() - started)
        return True

    def health(self) -> dict[str, object]:
        progress = self.progress  # read once: the load ends in another thread
        return {
            "service": self.service.name,
            "status": self.state,
            "model": self.service.model,
            "device": None,
            "progress": asdict(progress) if progress else None,
            "memory_bytes": None,
            "needed_bytes": None,
            "queue": self.queue.figures(),
            "error": self.error,
            **self.service.health(),
        }

    def require_ready(self) -> None:
        if self.state == "loading":
            raise RequestError(503, "loading", f"{self.service.model} is being loaded.", retry_after=5)
        if self.state == "failed":
            raise RequestError(503, "load_failed", f"{self.service.model} could not be loaded: {self.error}")


class DeadlineReader(io.RawIOBase):
    """Reads from a socket until a deadline, so that a client that sends a byte now and then can't hold a thread."""

    def __init__(self, link: socket.socket, seconds: float) -> None:
        self._link = link
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._link.settimeout(left)
        return self._link.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One connection, and its one request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self._begun = False
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, READ_SECONDS))

    def handle(self) -> None:
        self.handle_one_request()

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answer what `http.server` refuses itself, such as a malformed head, in the same form as other errors."""
        if code == 501:
            self.fail(RequestError(405, "method_not_allowed", "Use GET or POST."))
        else:
            self.fail(RequestError(int(code), "invalid_request", message or "The request is not valid HTTP."))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: requests for work are logged as jobs."""

    def fail(self, error: RequestError) -> None:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        self.send(error.status, "application/json", _json(error.body()), headers)

    def send(self, status: int, media_type: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.begin(status, {"Content-Type": media_type, "Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of an answer."""
        self._begun = True
        self.connection.settimeout(WRITE_SECONDS)
        self.send_response(status)
        fixed = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Connection": "close"}
        for name, value in {**headers, **fixed}.items():
            self.send_header(name, value)
        self.end_headers()

    def version_string(self) -> str:
        return "switchyard-local-server"

    def _answer(self, answer: Callable[[str], None]) -> None:
        self._unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        try:
            self._require_local()
            answer(self.path.partition("?")[0])
        except RequestError as error:
            self.fail(error)
            if self._unread:
                self._linger()
        except OSError as error:
            if self._begun or not isinstance(error, TimeoutError):
                raise  # the client has disconnected, or takes no answer
            self.fail(RequestError(408, "timeout", f"The request did not arrive within {READ_SECONDS:.0f} s."))
        except Exception as error:
            log.exception("A request failed")
            if not self._begun:
                self.fail(_as_request_error(error))

    def _require_local(self) -> None:
        """Refuse what a page in a browser may have sent, from another site or by rebinding a name to loopback."""
        if "Origin" in self.headers:
            raise RequestError(403, "forbidden", "Requests of web pages are refused.")
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not is_loopback(hosts[0]):
            raise RequestError(403, "forbidden", "The Host header must be a loopback address.")

    def _get(self, path: str) -> None:
        if path == "/health":
            self.send(200, "application/json", _json(self.server.health()))
        elif path == "/v1/models":
            model = {"id": self.server.service.model, "object": "model", "owned_by": "switchyard"}
            self.send(200, "application/json", _json({"object": "list", "data": [model]}))
        elif path in self.server.service.routes:
            raise RequestError(405, "method_not_allowed", f"{path} takes POST.")
        else:
            raise RequestError(404, "not_found", f"There is no {path} here.")

    def _post(self, path: str) -> None:
        route = self.server.service.routes.get(path)
        if route is None:
            raise RequestError(404, "not_found", f"There is no {path} to POST to here.")
        route(self._read_body(), Exchange(self))

    def _read_body(self) -> dict[str, Any]:
        limit = self.server.service.max_body_bytes
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise RequestError(400, "invalid_request", "The request needs a Content-Length.")
        if len(length) > 15 or int(length) > limit:
            raise RequestError(413, "too_large", f"The request is larger than {limit / 1e6:.1f} MB.")
        raw = self.rfile.read(int(length))
        self._unread = False
        if len(raw) < int(length):
            raise RequestError(400, "invalid_request", "The request ended early.")
        try:
            body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, "invalid_request", "The body is not valid JSON.") from error
        if not isinstance(body, dict):
            raise RequestError(400, "invalid_request", "The body must be a JSON object.")
        return body

    def _linger(self) -> None:
        """Discard what is still sent: closing with unread bytes would reset the connection, and the answer with it."""
        deadline = time.monotonic() + LINGER_SECONDS
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65_536):
                    break


class Exchange:
    """A request that is being answered, as a route sees it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server = handler.server

    @property
    def wants_events(self) -> bool:
        return "text/event-stream" in self._handler.headers.get("Accept", "")

    def send(self, media_type: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._handler.send(200, media_type, body, headers)

    def send_json(self, body: Mapping[str, object]) -> None:
        self.send("application/json", _json(body))

    def run(self, label: str, work: Callable[[Job], Any]) -> Any:
        """Have the work done and return its result. Raises RequestError, and ConnectionError if the client is gone."""
        result = None
        for event in self._events(self._submit(label, work)):
            if not isinstance(event, Step):
                result = event
        return result

    def stream(self, label: str, work: Callable[[Job], Mapping[str, object]]) -> None:
        """Have the work done while its steps are sent as events; the last event is its result or error."""
        job = self._submit(label, work)
        handler = self._handler
        try:
            handler.begin(200, {"Content-Type": "text/event-stream; charset=utf-8"})
            for event in self._events(job, lambda: handler.wfile.write(b": waiting\n\n")):
                self._send_event(asdict(event) if isinstance(event, Step) else event)
        except RequestError as error:
            self._send_event(error.body())
        except OSError:
            self._server.queue.cancel(job, "the client disconnected")
            raise

    def _send_event(self, event: Mapping[str, object]) -> None:
        self._handler.wfile.write(b"data: " + _json(event) + b"\n\n")

    def _submit(self, label: str, work: Callable[[Job], Any]) -> Job:
        self._server.require_ready()
        job = Job(label, work)
        self._server.queue.submit(job)
        return job

    def _events(self, job: Job, keep_alive: Callable[[], object] = lambda: None) -> Iterator[Any]:
        """Yield the job's steps, then its result; cancel it when the client disconnects."""
        spoken = time.monotonic()
        while True:
            if has_disconnected(self._handler.connection):
                self._server.queue.cancel(job, "the client disconnected")
                raise ConnectionAbortedError
            try:
                event = job.events.get(timeout=POLL_SECONDS)
            except Empty:
                if time.monotonic() - spoken > KEEP_ALIVE_SECONDS:
                    spoken = time.monotonic()
                    keep_alive()
                continue
            spoken = time.monotonic()
            if isinstance(event, Step):
                yield event
                continue
            result, error = event
            if error is not None:
                raise _as_request_error(error)
            yield result
            return


def is_loopback(host: str) -> bool:
    """Return whether the value of a Host header, with or without a port, names this machine's loopback."""
    if "/" in host or "@" in host:
        return False
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def has_disconnected(link: socket.socket) -> bool:
    """Return whether the client has closed its side. A client that closes only its sending side counts too."""
    poll = select.poll()
    closing = getattr(select, "POLLRDHUP", 0)
    poll.register(link, select.POLLIN | closing)
    events = poll.poll(0)
    if not events:
        return False
    if events[0][1] & (closing | select.POLLHUP | select.POLLERR):
        return True
    try:
        return link.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, Cancelled):
        return RequestError(503, "stopping", f"Cancelled: {error}.")
    first_line = next(iter(str(error).splitlines()), "")[:500]
    return RequestError(500, "failed", f"{type(error).__name__}: {first_line}".removesuffix(": "))


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
