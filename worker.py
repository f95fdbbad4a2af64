"""gunicorn's gevent worker, which can end in other ways as well.

- Told to stop, it hangs up on idle connections: browsers and API clients keep them open for minutes, and gunicorn 27
  waits for each until `graceful_timeout`.
- Asked to restart, it begins no request any more but leaves them to the next worker, with their connections.
- Clients that are slow, or too many, keep nobody else out.
- Without its master, or given up by it, it ends as for a restart: nobody wanted the models to be unloaded.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BytesIO
from typing import Any

import gevent
from gevent.socket import wait_read
from gunicorn.http import wsgi
from gunicorn.workers.base_async import ALREADY_HANDLED
from gunicorn.workers.ggevent import GeventWorker
from werkzeug.exceptions import HTTPException

from door import ClientSocket, Door
from intake import WholeBody
from services.restart import UNBEGUN, RestartRefused
from signals import drop_dead_streams, terminal
from succession import Succession, written_again

Environ = dict[str, Any]

DOOR_PART = 20
"""One of so many places that gunicorn has is kept free: who comes when all others are taken has to be let in, or sent
away, rather than be left standing."""


class Worker(GeventWorker):  # type: ignore[misc]
    """Knows its open connections, and what becomes of them."""

    succession = Succession()
    """The master's, as this module is; every worker inherits it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._door = Door(self.worker_connections - self.worker_connections // DOOR_PART)
        self._clients: set[socket.socket] = set()
        self._busy = 0
        self._taker: gevent.Greenlet | None = None

    @property
    def services(self) -> Any:
        return self.app.callable.extensions["switchyard"]

    @property
    def orphaned(self) -> bool:
        """Whether the master is gone."""
        return bool(self.ppid != os.getppid())

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGHUP, self.handle_hup)
        signal.siginterrupt(signal.SIGHUP, False)
        for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def handle_hup(self, _number: int, _frame: object) -> None:
        gevent.spawn(self._hang_up_signalled)

    def handle_exit(self, number: int, frame: object) -> None:
        drop_dead_streams()
        super().handle_exit(number, frame)

    def handle_abort(self, number: int, frame: object) -> None:
        """The master gave up on it, and starts another one."""
        with suppress(AttributeError):  # it had not begun to serve
            self.services.restart.abandon()
        super().handle_abort(number, frame)

    def notify(self) -> None:
        """Tell the master that it is alive. gunicorn's would end the process at once when the master is gone."""
        super(GeventWorker, self).notify()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self._app = self.wsgi
        self._restart = self.services.restart
        self._longest = self.services.settings.max_body_bytes
        self.wsgi = self._answer

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """As gunicorn's, which would have the client wait, and be waited for, without a limit."""
        if not isinstance(client, ClientSocket):
            client = ClientSocket(client.detach())
        if not self._door.enter(client, addr[0]):
            client.refuse()
            return
        self._clients.add(client)
        try:
            super(GeventWorker, self).handle(listener, client, addr)
        finally:
            self._clients.discard(client)
            self._door.leave(client)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        self._busy += 1
        sock.expect_body()
        try:
            super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:  # it takes nothing of its answer
            raise StopIteration from None
        finally:
            self._busy -= 1
            sock.expect_head()
            self._door.wait_for(sock)
        if sock not in self._clients:
            raise StopIteration  # what comes next on it is for the next worker

    def take_over(self) -> None:
        """Answer, from now on, what the worker before has left."""
        self._taker = gevent.spawn(self._take)

    def await_answers(self, seconds: float) -> None:
        """Block until no request is under way, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self._busy and time.monotonic() < deadline:
            gevent.sleep(0.02)

    def hang_up(self) -> None:
        """End every connection once the answer under way on it is written."""
        for client in list(self._clients):
            with suppress(OSError):
                client._sock.shutdown(socket.SHUT_RD)  # type: ignore[attr-defined]  # gevent's own fails the reader

    def _hang_up_signalled(self) -> None:
        if terminal.says(gevent.sleep) != "restart":
            drop_dead_streams()  # where the terminal is gone the master ends this process
            return
        try:
            self.services.restart.request()
        except RestartRefused as refused:
            self.log.warning("SIGHUP restarts nothing. %s", refused)
        except AttributeError:
            self.log.warning("SIGHUP restarts nothing: the app is only just starting.")

    def _answer(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes] | object:
        """The WSGI app as gunicorn calls it."""
        client = environ["gunicorn.socket"]
        environ["wsgi.input"] = WholeBody(environ, self._longest, lambda: self._door.answer(client))
        if self._restart.requested and self._leave(environ, self._read(environ)):
            return ALREADY_HANDLED
        answer = self._app(environ, start_response)
        if not self._leave(environ, environ.get(UNBEGUN)):
            return answer
        answer.close()
        return ALREADY_HANDLED

    def _read(self, environ: Environ) -> bytes | None:
        """The body of a request; None when it is longer than may be, or not all there, which the app will say."""
        try:
            body: bytes = environ["wsgi.input"].read()
        except (OSError, HTTPException):
            return None
        environ["wsgi.input"] = BytesIO(body)
        return body

    def _leave(self, environ: Environ, body: bytes | None) -> bool:
        """Leave a request that nobody has begun to the next worker, with its connection. Whether that was possible."""
        if body is None:
            return False
        if self._taker is not None:
            self._taker.kill()  # or it would take what is given here
        client = environ["gunicorn.socket"]
        if not self.succession.give(client, written_again(environ, body)):
            return False
        self._clients.discard(client)
        return True

    def _take(self) -> None:
        while True:
            wait_read(self.succession.fileno())
            left = self.succession.take()
            if left is not None:
                descriptor, request = left
                client = ClientSocket(descriptor, request)
                gevent.spawn(self.handle, self.sockets[0], client, client.getpeername())


class Response(wsgi.Response):  # type: ignore[misc]
    """An answer whose head is sent together with the first piece of its body: gunicorn's takes two system calls."""

    def write(self, arg: bytes) -> None:
        if self.headers_sent:
            super().write(arg)
            return
        first, client = _Gathered(), self.sock
        self.sock = first
        try:
            super().write(arg)
        finally:
            self.sock = client
        client.sendall(b"".join(first.pieces))


class _Gathered:
    """What would have been sent."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def sendall(self, piece: bytes) -> None:
        self.pieces.append(piece)


wsgi.Response = Response  # gunicorn makes the answers of every worker by this name
