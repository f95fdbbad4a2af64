"""What the two servers have in common: HTTP, the queue of work, health, and the life of the process.

Only the standard library is needed here, so that a server answers `/health` before the heavy packages are imported,
and can say which of them is missing.

One thread does the work, one job at a time; a thread per connection reads the request, waits for the job, and cancels
it when the client disconnects. Every connection, body, queue and wait is bounded.
"""

from __future__ import annotations

import argparse
import io
import ipaddress
import json
import logging
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from socketserver import TCPServer
from typing import Any, Literal, Protocol, cast
from urllib.parse import urlsplit

WAITING_LIMIT = 8
"""Jobs that may wait for the one that runs."""
CONNECTION_LIMIT = 64
READ_SECONDS = 10.0
"""Time in which a whole request must have arrived."""
WRITE_SECONDS = 30.0
POLL_SECONDS = 0.05
"""How often a waiting connection is checked for a client that has disconnected."""
KEEP_ALIVE_SECONDS = 15.0
LINGER_SECONDS = 2.0
"""Time given to a client to take a refusal before it has sent its whole body."""
FAILED_SECONDS = 2.0
"""How long /health tells why a load failed before the process exits."""
SIGNAL_SECONDS = 0.2
"""Longest time until a signal is noticed."""
STOP_SECONDS = 1.0
"""Time given to the running job after SIGTERM."""

log = logging.getLogger("local-servers")


class RequestError(Exception):
    """A request that is answered with an error. `figures` are added to the error object."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None, **figures: object) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.figures = figures

    def body(self) -> dict[str, object]:
        return {"error": {"code": self.code, "message": self.message, **self.figures}}


class OutOfMemoryError(RequestError):
    """The work needs more memory than is free. Both figures are bytes; None if unknown."""

    def __init__(self, device: str, free_bytes: int | None, needed_bytes: int | None) -> None:
        said = [f"{_gigabytes(free_bytes)} were free"] if free_bytes is not None else []
        said += [f"about {_gigabytes(needed_bytes)} are needed"] if needed_bytes is not None else []
        message = f"Out of memory on {device}" + (f": {', '.join(said)}." if said else ".")
        super().__init__(507, "out_of_memory", message, free_bytes=free_bytes, needed_bytes=needed_bytes)


class Cancelled(Exception):
    """The work is no longer wanted. The text says why."""


@dataclass(frozen=True)
class Progress:
    """How far a load is; the totals are None if they aren't known."""

    stage: Literal["downloading", "loading"]
    completed_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True)
class Step:
    """One step of a job is done."""

    step: int
    steps: int


class Service(Protocol):
    """What a server serves. `load` runs once, in its own thread; the routes' work runs in the work thread."""

    model: str
    max_body_bytes: int

    @property
    def routes(self) -> Mapping[str, Callable[[dict[str, Any], Exchange], None]]:
        """Return what answers a POST, by path: called with the JSON body. May raise RequestError."""

    def load(self, report: Callable[[Progress], None]) -> None:
        """Load the model. An exception's text is shown to people as the cause."""

    def health(self) -> Mapping[str, object]:
        """Return at once what /health adds: `device`, `memory_bytes`, `needed_bytes`, and more."""


class Job:
    """A piece of work. Its events are steps, and at the end its result or exception."""

    def __init__(self, label: str, work: Callable[[Job], Any]) -> None:
        self.label = label
        self.events: SimpleQueue[Step | tuple[Any, Exception | None]] = SimpleQueue()
        self._work = work
        self._cancelled: str | None = None

    def step(self, done: int, total: int) -> None:
        """Report that a step is done. Raises Cancelled if the work is no longer wanted."""
        self.check()
        self.events.put(Step(done, total))

    def check(self) -> None:
        """Raise Cancelled if the work is no longer wanted."""
        if self._cancelled is not None:
            raise Cancelled(self._cancelled)

    def cancel(self, reason: str) -> None:
        self._cancelled = self._cancelled or reason

    def run(self) -> None:
        started = time.monotonic()
        log.info("%s started", self.label)
        result, error = None, None
        try:
            self.check()
            result = self._work(self)
        except Exception as raised:
            error = raised
        took = time.monotonic() - started
        if isinstance(error, Cancelled):
            log.info("%s cancelled after %.2f s: %s", self.label, took, error)
        elif isinstance(error, RequestError):
            log.warning("%s failed after %.2f s: %s", self.label, took, error)
        elif error is not None:
            log.error("%s failed after %.2f s", self.label, took, exc_info=error)
        else:
            log.info("%s finished in %.2f s", self.label, took)
        self.events.put((result, error))


class WorkQueue:
    """Runs jobs one at a time, in the order in which they came."""

    def __init__(self, limit: int = WAITING_LIMIT) -> None:
        self.limit = limit
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._last_seconds = 1.0
        self._closed: str | None = None
        threading.Thread(target=self._run, name="work", daemon=True).start()

    def figures(self) -> dict[str, int]:
        with self._changed:
            return {"running": int(self._running is not None), "waiting": len(self._waiting), "limit": self.limit}

    def submit(self, job: Job) -> None:
        """Put the job last. Raises RequestError if too many wait already or the server is stopping."""
        with self._changed:
            if self._closed:
                raise RequestError(503, "stopping", "The server is stopping.")
            if len(self._waiting) >= self.limit:
                wait = max(1, math.ceil(self._last_seconds))
                raise RequestError(429, "queue_full", f"{self.limit} requests are waiting already.", retry_after=wait)
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job, reason: str) -> None:
        """Remove a waiting job; a running one ends at its next step."""
        job.cancel(reason)
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)
            log.info("%s cancelled while it waited: %s", job.label, reason)

    def close(self, timeout: float) -> None:
        """Take no more jobs, cancel all there are, and wait at most `timeout` seconds for the running one."""
        with self._changed:
            self._closed = "the server is stopping"
            waiting, running = list(self._waiting), self._running
        for job in waiting:
            self.cancel(job, self._closed)
            job.events.put((None, RequestError(503, "stopping", "The server is stopping.")))
        if running is not None:
            running.cancel(self._closed)
        with self._changed:
            self._changed.wait_for(lambda: self._running is None, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._running = job = self._waiting.popleft()
            started = time.monotonic()
            job.run()
            with self._changed:
                self._running = None
                self._last_seconds = time.monotonic() - started
                self._changed.notify_all()


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
        except Exception as error:
            self.error = str(error) or type(error).__name__
            self.state, self.progress = "failed", None
            log.exception("Loading %s failed", self.service.model)
            return False
        self.state, self.progress = "ready", None
        log.info("%s is ready after %.1f s", self.service.model, time.monotonic() - started)
        return True

    def health(self) -> dict[str, object]:
        return {
            "status": self.state,
            "model": self.service.model,
            "device": None,
            "progress": asdict(self.progress) if self.progress else None,
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


def serve(
    service: Service, host: str, port: int, stop_signals: Collection[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
) -> int:
    """Listen at once, load in the background, and serve until a signal or a failed load; return the exit code.

    Call `leave` with it. `host` must be a loopback address.
    """
    ending: SimpleQueue[int] = SimpleQueue()
    for number in stop_signals:
        signal.signal(number, lambda *_: ending.put(0))
    try:
        server = Server(service, host, port)
    except OSError as error:
        log.error("Can't listen on %s port %d: %s", host, port, error.strerror or error)
        return 1
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    log.info("Listening at http://%s:%d", f"[{host}]" if ":" in host else host, server.server_port)

    def load() -> None:
        if not server.load():
            time.sleep(FAILED_SECONDS)
            ending.put(1)

    threading.Thread(target=load, name="load", daemon=True).start()
    code = None
    while code is None:  # a signal that the kernel gives to another thread doesn't end the wait of this one
        with suppress(Empty):
            code = ending.get(timeout=SIGNAL_SECONDS)
    server.stop(STOP_SECONDS)
    log.info("Ending with code %d", code)
    return code


def leave(code: int) -> None:
    """End the process at once, whatever its threads do: native code that computes can't be interrupted."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def arguments(description: str, port: int, model: str) -> argparse.ArgumentParser:
    """Return the parser of the arguments that both servers take, and set up logging to stderr."""
    # The libraries' warnings only: on INFO, the client of the hub logs signed addresses.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", type=_loopback_host, help="a loopback address (127.0.0.1)")
    parser.add_argument("--port", default=port, type=int, help=f"the port to listen on ({port})")
    parser.add_argument("--model", default=model, help=f"a name on the Hugging Face hub, or a folder ({model})")
    return parser


def text(body: Mapping[str, Any], name: str, limit: int) -> str:
    """Return a text of the body, which must be there, not blank, and at most `limit` characters long."""
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise invalid(f"{name} must be a text that is not empty.")
    if len(value) > limit:
        raise invalid(f"{name} may have {limit} characters; this one has {len(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{name} contains half of a surrogate pair.") from error
    return value


def integer(body: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    """Return an integer of the body from `low` to `high`, or the default if it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise invalid(f"{name} must be a whole number from {low} to {high}.")
    return value


def invalid(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)


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


def resident_bytes() -> int | None:
    """Return the process's resident memory in bytes; None where /proc is missing."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


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


def _loopback_host(host: str) -> str:
    if not is_loopback(f"[{host}]" if ":" in host else host):
        raise argparse.ArgumentTypeError(
            "must be a loopback address: there are no keys here that would keep others out"
        )
    return host


def _gigabytes(value: int | None) -> str:
    return f"{cast(int, value) / 1e9:.1f} GB"
