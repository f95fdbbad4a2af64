"""In-memory connections to scripted engines.

`Wire` implements the relay's `Network`. An engine's behaviour for a request is a script: a pure list of steps, made
from the act that the request's body names.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from services.gateway.connections import CONNECT_SECONDS
from tests.heart.virtual import VirtualScheduler

END, RESET, HANG = "end", "reset", "hang"
"""Steps other than bytes to send and seconds to wait: close the connection, reset it, send nothing for ever."""
Step = bytes | float | str

WHOLE = (
    "whole",
    "pieces",
    "chunked",
    "sse",
    "until_close",
    "interim",
    "drop_reused",
    "close_after",
    "hang_up_after",
    "twice",
    "refused",
)
"""Acts with a complete response, unless something interrupts them."""
BROKEN = ("cut", "cut_sse", "reset_midway", "stall", "stall_sse")
"""Acts that end in the middle of a response."""
FAILED = {
    "drop": "engine_unreachable",
    "reset": "engine_unreachable",
    "garbage": "engine_unreachable",
    "cut_head": "engine_unreachable",
    "endless_head": "engine_unreachable",
    "silent": "engine_timeout",
    "interim_silent": "engine_timeout",
    "no_route": "NotFound",
    "no_method": "MethodNotAllowed",
}
"""Acts without a response to relay, and the client's error for each."""
ACTS = (*WHOLE, *BROKEN, *FAILED)

NO_ROUTE = json.dumps({"error": {"message": "File Not Found"}}).encode()


class LinkClosed(Exception):
    """The relay has closed the connection, or the engine has ended."""


class Link:
    """One connection with both ends; bytes sent at one end arrive at the other at once."""

    def __init__(self, scheduler: VirtualScheduler, origin: str, read_timeout: float) -> None:
        self.origin = origin
        self._scheduler = scheduler
        self._changed = scheduler.condition()
        self._read_timeout = read_timeout
        self._to_engine = bytearray()
        self._to_relay = bytearray()
        self._ended: str | None = None
        self.ended_at: float | None = None
        """When the engine closed it."""
        self._shut = False
        self.closed = False
        self.arrivals: list[Arrival] = []

    # The relay's end implements `services.gateway.connections.Connection`.

    def recv(self, size: int, /) -> bytes:
        self._check_open()
        self._changed.wait_for(lambda: self._to_relay or self._ended or self._shut, self._read_timeout)
        if self._to_relay:  # received bytes can be read even after a shutdown
            data = bytes(self._to_relay[:size])
            del self._to_relay[:size]
            self.arrivals[-1].heard += len(data)
            return data
        if self._shut:
            raise OSError(errno.EBADF, "shut in another greenlet")
        if self._ended is None:
            raise TimeoutError("timed out")
        if self._ended == RESET:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        return b""

    def sendall(self, data: bytes, /) -> None:
        self._check_open()
        if self._ended is not None:
            raise BrokenPipeError(errno.EPIPE, "closed by the engine")
        self._to_engine += data
        self._notify()

    def abort(self) -> None:
        self._shut = True
        self._notify()

    def is_reusable(self) -> bool:
        self._check_open()
        return not self._to_relay and self._ended is None

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self._notify()

    def _check_open(self) -> None:
        assert not self.closed, "used after it was closed"

    # The engine's end.

    @property
    def live(self) -> bool:
        """Whether neither side has closed it."""
        return not (self.closed or self._shut or self._ended)

    def request(self, timeout: float) -> dict[str, Any] | None:
        """The next request's body; None if none arrives within `timeout` seconds. Raises LinkClosed."""
        found = self._changed.wait_for(lambda: not self.live or self._whole_request() is not None, timeout)
        self._check_live()
        if not found:
            return None
        body, used = self._whole_request() or (b"", 0)
        del self._to_engine[:used]
        return json.loads(body)  # type: ignore[no-any-return]

    def send(self, data: bytes) -> None:
        """Send bytes to the relay. Raises LinkClosed."""
        self._check_live()
        self._to_relay += data
        self._notify()

    def wait(self, seconds: float | None) -> None:
        """Wait; raises LinkClosed as soon as it is closed."""
        self._changed.wait_for(lambda: not self.live, seconds)
        self._check_live()

    def end(self, how: str = END) -> None:
        """Close it as the engine; a reset discards what was not read yet."""
        if self._ended is None:
            self._ended, self.ended_at = how, self._scheduler.now()
            if how == RESET:
                self._to_relay.clear()
            self._notify()

    def _whole_request(self) -> tuple[bytes, int] | None:
        head, mark, rest = bytes(self._to_engine).partition(b"\r\n\r\n")
        if not mark:
            return None
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields[b"content-length"])
        return (rest[:length], len(head) + 4 + length) if len(rest) >= length else None

    def _check_live(self) -> None:
        if not self.live:
            raise LinkClosed

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


@dataclass(eq=False)
class Arrival:
    """One request as an engine received it. `reused`: the connection had carried another one before."""

    number: int
    model: str
    link: Link
    reused: bool
    since: float
    """When it arrived, or the engine last sent something."""
    heard: int = 0
    """Bytes that the relay has read of the response."""
    at_work: bool = True
    finished: bool = False
    """Whether the engine has completed its script."""


@dataclass(eq=False)
class Wire:
    """The network of one app. `listens` says whether an engine accepts connections at an origin."""

    scheduler: VirtualScheduler
    read_timeout: float
    listens: Callable[[str], bool] = lambda _: True
    keep_alive: float = 30.0
    """Seconds after which engines close an idle connection."""
    slow_dial: float = 0.0
    links: list[Link] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)

    # The relay's `Network`.

    def dial(self, origin: str) -> Link:
        if self.slow_dial:
            self.scheduler.pause(min(self.slow_dial, CONNECT_SECONDS))
        if self.slow_dial > CONNECT_SECONDS or not self.listens(origin):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        link = Link(self.scheduler, origin, self.read_timeout)
        self.links = [one for one in self.links if not one.closed]
        self.links.append(link)
        self.scheduler.spawn("engine", lambda: self._serve(link))
        return link

    def now(self) -> float:
        return self.scheduler.now()

    def call_later(self, seconds: float, act: Callable[[], None]) -> None:
        def run() -> None:
            self.scheduler.pause(seconds)
            act()

        self.scheduler.spawn("timer", run)

    # The engines.

    def end(self, origin: str, models: Iterable[str] | None = None, how: str = END) -> None:
        """End an engine, or only its answers of some models."""
        for link in self.links:
            current = link.arrivals[-1] if link.arrivals else None
            answering = current is not None and current.at_work and models is not None and current.model in models
            if link.origin == origin and (models is None or answering):
                link.end(how)

    def open_links(self) -> list[Link]:
        return [link for link in self.links if not link.closed]

    def _serve(self, link: Link) -> None:
        try:
            while (request := link.request(self.keep_alive)) is not None:
                arrival = Arrival(request["number"], request["model"], link, bool(link.arrivals), self.scheduler.now())
                link.arrivals.append(arrival)
                self.arrivals.append(arrival)
                try:
                    self._answer(arrival, script(request["act"], request["number"], request["seconds"], arrival.reused))
                    arrival.finished = True
                finally:
                    arrival.at_work = False
            link.end()
        except LinkClosed:
            link.end(RESET)

    def _answer(self, arrival: Arrival, steps: Iterable[Step]) -> None:
        for step in steps:
            if isinstance(step, bytes):
                arrival.link.send(step)
                arrival.since = self.scheduler.now()
            elif isinstance(step, float):
                arrival.link.wait(step)
            elif step == HANG:
                arrival.link.wait(None)
            else:
                arrival.finished = True
                arrival.link.end(step)
                raise LinkClosed


def parts_of(act: str, number: int) -> list[bytes]:
    """The response body for an act, in pieces; unique per request."""
    if act.endswith("sse"):
        return [f'data: {{"number": {number}, "part": {part}}}\n\n'.encode() for part in range(4)]
    return [f"{number}/{part};".encode() * (part + 1) for part in range(4)]


def script(act: str, number: int, seconds: float, reused: bool) -> list[Step]:
    """An engine's steps for a request, spread over `seconds`."""
    parts, pause = parts_of(act, number), seconds / 4
    body = b"".join(parts)
    kind = "text/event-stream" if act.endswith("sse") else "application/json"
    sized, chunked = _head(kind, f"Content-Length: {len(body)}"), _head(kind, "Transfer-Encoding: chunked")
    if act == "drop_reused":
        return [END] if reused else [seconds, sized + body]
    paced: list[Step] = [step for part in parts for step in (pause, _chunk(part))]
    scripts: dict[str, list[Step]] = {
        "whole": [seconds, sized + body],
        "pieces": [sized, *(step for part in parts for step in (pause, part))],
        "chunked": [pause, chunked, *paced, b"0\r\n\r\n"],
        "sse": [chunked, *paced, b"0\r\n\r\n"],
        "until_close": [_head(kind), *(step for part in parts for step in (pause, part)), END],
        "interim": [b"HTTP/1.1 102 Processing\r\n\r\n", seconds, sized + body],
        "close_after": [seconds, _head(kind, f"Content-Length: {len(body)}", "Connection: close") + body, END],
        "hang_up_after": [seconds, sized + body, END],
        "twice": [seconds, sized + body + sized + body],
        "refused": [seconds, _head(kind, f"Content-Length: {len(body)}", status="400 Bad Request") + body],
        "cut": [sized, parts[0], seconds, END],
        "cut_sse": [chunked, _chunk(parts[0]), seconds, END],
        "reset_midway": [chunked, _chunk(parts[0]), seconds, RESET],
        "stall": [sized, parts[0], HANG],
        "stall_sse": [chunked, _chunk(parts[0]), HANG],
        "drop": [seconds, END],
        "reset": [seconds, RESET],
        "garbage": [seconds, b"220 mail server ready\r\n", END],
        "cut_head": [sized[:30], seconds, END],
        "endless_head": [b"HTTP/1.1 200 OK\r\n", *[b"X-More: " + b"x" * 20_000 + b"\r\n"] * 20, HANG],
        "silent": [HANG],
        "interim_silent": [b"HTTP/1.1 102 Processing\r\n\r\n", HANG],
        "no_route": [seconds, _head(kind, f"Content-Length: {len(NO_ROUTE)}", status="404 Not Found") + NO_ROUTE],
        "no_method": [seconds, _head(kind, "Content-Length: 0", "Allow: GET", status="405 Method Not Allowed")],
    }
    return scripts[act]


def _head(kind: str, *fields: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *fields]).encode() + b"\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"
