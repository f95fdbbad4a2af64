"""gunicorn's gevent worker, with a hot lane for the gateway, limits for clients, and its own shutdown and restart.

- Plain requests to running models are answered by the hot lane, the others by gunicorn and the app.
- On shutdown it closes idle connections: browsers and API clients keep them open for minutes, and gunicorn 27
  waits for each until `graceful_timeout`.
- On restart it starts no new request, but passes them to the next worker, with their connections.
- Slow clients, and too many connections, don't lock out other clients.
- When its master has died or aborts it, it ends as for a restart: the models stay loaded.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from io import BytesIO
from typing import Any

import gevent
import gunicorn.http
import gunicorn.util
from gevent.socket import wait_read
from gunicorn.http import wsgi
from gunicorn.http.parser import RequestParser
from gunicorn.workers.base_async import ALREADY_HANDLED
from gunicorn.workers.ggevent import GeventWorker
from werkzeug.exceptions import HTTPException

from server.client_socket import ClientSocket, refusal
from server.connection_limits import ConnectionLimits
from server.handover import Handover, request_bytes
from server.request_body import RequestBody
from server.signals import drop_dead_streams, terminal
from services.restart import FAILED, UNBEGUN, RestartRefused

Environ = dict[str, Any]

SPARE_PART = 20
"""One in so many of gunicorn's connections is kept free: it accepts none beyond its limit, so a further client would
wait in the kernel's queue, and could not even be refused."""


class Worker(GeventWorker):  # type: ignore[misc]
    """Tracks its open connections: to limit and close them, and to pass them to the next worker."""

    handover = Handover()
    """Created in the master, which imports this module, so that every worker inherits it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = ConnectionLimits(self.worker_connections - self.worker_connections // SPARE_PART)
        self._clients: set[socket.socket] = set()
        self._busy = 0
        self._taker: gevent.Greenlet | None = None

    @property
    def services(self) -> Any:
        return self.app.callable.extensions["switchyard"]

    @property
    def orphaned(self) -> bool:
        """Whether the master has died."""
        return bool(self.ppid != os.getppid())

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGHUP, self.handle_hup)
        signal.siginterrupt(signal.SIGHUP, False)
        for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def handle_hup(self, _number: int, _frame: object) -> None:
        gevent.spawn(self._restart_or_redirect)

    def handle_exit(self, number: int, frame: object) -> None:
        drop_dead_streams()
        super().handle_exit(number, frame)

    def handle_abort(self, number: int, frame: object) -> None:
        """On SIGABRT: the master got no heartbeat from this worker, and replaces it."""
        with suppress(AttributeError):  # it had not begun to serve
            self.services.restart.abandon()
        super().handle_abort(number, frame)

    def notify(self) -> None:
        """Send the master a heartbeat. gunicorn's method would end the process at once when the master has died."""
        super(GeventWorker, self).notify()

    def load_wsgi(self) -> None:
        from blueprints.polls import Polls
        from server.hot_lane import HotLane  # the master, which imports this module as well, has not patched ssl

        super().load_wsgi()
        self._app: Callable[..., Iterable[bytes]] = self.wsgi  # type: ignore[has-type]
        self._restart = self.services.restart
        self._longest = self.services.settings.max_body_bytes
        self.wsgi = self._answer
        app = self.app.callable
        guard = app.extensions["switchyard.guard"]
        self._lane = HotLane(self.services, guard, Polls(app), self._begins_requests, self._begin, self._end)

    def timeout_ctx(self) -> Any:
        """No limit here: the hot lane answers several requests within this context. `ClientSocket` has the limits."""
        return nullcontext()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Handle a connection as gunicorn does, but with limits on the number of connections and on waiting."""
        if not isinstance(client, ClientSocket):
            client = ClientSocket(client.detach())
        if not self._limits.admit(client, addr[0]):
            client.refuse()
            return
        self._clients.add(client)
        client.lane = self._lane
        try:
            super(GeventWorker, self).handle(listener, client, addr)
        finally:
            self._clients.discard(client)
            self._limits.remove(client)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        self._busy += 1
        sock.expect_body()
        try:
            super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:  # the client does not read its response
            raise StopIteration from None
        finally:
            self._end(sock)
        if sock not in self._clients:
            raise StopIteration  # it was passed on: the next worker reads what follows

    def take_over(self) -> None:
        """Start answering the requests that the previous worker passed on."""
        self._taker = gevent.spawn(self._take)

    def await_answers(self, seconds: float) -> None:
        """Block until no request is under way, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self._busy and time.monotonic() < deadline:
            gevent.sleep(0.02)

    def close_connections(self) -> None:
        """Close every connection once the response under way on it is written."""
        for client in list(self._clients):
            with suppress(OSError):
                client._sock.shutdown(socket.SHUT_RD)  # type: ignore[attr-defined]  # gevent's own fails the reader

    def _begins_requests(self) -> bool:
        return self.alive and not self._restart.requested

    def _begin(self, client: ClientSocket) -> None:
        """Count a request that the hot lane answers."""
        self._busy += 1
        self._limits.answer(client)

    def _end(self, client: ClientSocket) -> None:
        self._busy -= 1
        client.expect_head()
        self._limits.wait_for(client)

    def _restart_or_redirect(self) -> None:
        if terminal.says(gevent.sleep) != "restart":
            drop_dead_streams()  # if the terminal is gone, the master ends this process
            return
        try:
            self.services.restart.request()
        except RestartRefused as refused:
            self.log.warning("SIGHUP restarts nothing. %s", refused)
        except AttributeError:
            self.log.warning("SIGHUP restarts nothing: the app is only just starting.")

    def _answer(self, environ: Environ, start_response: Callable[..., Any]) -> Any:
        """What gunicorn calls: pass the request to the app, with its whole body, or to the next worker on a restart."""
        client = environ["gunicorn.socket"]
        environ["wsgi.input"] = RequestBody(environ, self._longest, lambda: self._limits.answer(client))
        if client.failed is not None:
            environ[FAILED], client.failed = client.failed, None
        elif self._restart.requested and self._leave(environ, self._read(environ)):
            return ALREADY_HANDLED
        answer = self._app(environ, start_response)
        if not self._leave(environ, environ.get(UNBEGUN)):
            return answer
        answer.close()  # type: ignore[attr-defined]
        return ALREADY_HANDLED

    def _read(self, environ: Environ) -> bytes | None:
        """Return the body of a request; None if it is too long, malformed or incomplete, which the app then reports."""
        try:
            body: bytes = environ["wsgi.input"].read()
        except (OSError, HTTPException):
            return None
        environ["wsgi.input"] = BytesIO(body)
        return body

    def _leave(self, environ: Environ, body: bytes | None) -> bool:
        """Pass a request that was not started to the next worker, with its connection; return whether that worked."""
        if body is None:
            return False
        if self._taker is not None:
            self._taker.kill()  # or this worker would take back what it gives
        client = environ["gunicorn.socket"]
        if not self.handover.give(client, request_bytes(environ, body)):
            return False
        self._clients.discard(client)
        return True

    def _take(self) -> None:
        while True:
            wait_read(self.handover.fileno())
            left = self.handover.take()
            if left is not None:
                descriptor, request = left
                client = ClientSocket(descriptor, request)
                with suppress(OSError):  # the client has gone
                    gevent.spawn(self.handle, self.sockets[0], client, client.getpeername())
                    continue
                client.close()


class Response(wsgi.Response):  # type: ignore[misc]
    """A response whose head is sent together with the first part of its body: gunicorn needs two system calls."""

    def write(self, arg: bytes) -> None:
        if self.headers_sent:
            super().write(arg)
            return
        first, client = _Gathered(), self.sock  # type: ignore[has-type]
        self.sock = first
        try:
            super().write(arg)
        finally:
            self.sock = client
        client.sendall(b"".join(first.pieces))


class _Gathered:
    """Stands in for the socket, and collects what is sent."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def sendall(self, piece: bytes) -> None:
        self.pieces.append(piece)


class Requests(RequestParser):  # type: ignore[misc]
    """The requests of a connection that the hot lane leaves to gunicorn."""

    def __init__(self, cfg: Any, client: ClientSocket, address: Any, **_options: Any) -> None:
        super().__init__(cfg, client, address)
        self._client = client

    def __next__(self) -> Any:
        before = self.mesg
        if before and (before.should_close() or not self.finish_body()):
            raise StopIteration
        self.mesg: Any = None  # the base class would look for the rest of its body behind the hot lane's requests
        buffered = self.unreader.take_buffered()
        received = self._client.lane.serve(self._client, self.source_addr[0], buffered)
        if not received:
            raise StopIteration
        self.unreader.unread(received)
        self._client.path = _path(received)
        return super().__next__()

    next = __next__


def _path(received: bytes) -> str:
    """Return the path in a request's first line; empty if there is none."""
    _method, _, target = received.partition(b"\r\n")[0].partition(b" ")
    return target.partition(b" ")[0].partition(b"?")[0].decode("latin-1")


_CODES = {500: "internal_error", 501: "not_implemented"}


def write_error(client: ClientSocket, status: int, _reason: str, message: str) -> None:
    """Refuse a request whose head can't be read, in the contract's shape: gunicorn answers with a page of its own."""
    from blueprints.web import ApiError, error_document  # later than the master, which must not import ssl

    message = message or "Switchyard hit a problem of its own."
    error = ApiError(_CODES.get(status, "bad_request"), message, status=status)
    gunicorn.util.write_nonblock(client, refusal(status, error_document(error, client.path)))


gunicorn.util.write_error = write_error  # gunicorn looks these up by name, and has no setting for them
wsgi.Response = Response
gunicorn.http.get_parser = Requests
