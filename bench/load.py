"""Load generator, run as a separate process so that it and the measuring process never wait for each other.

    python -m bench.load rate < JOB      as many requests as possible, from a number of concurrent clients
    python -m bench.load tabs < JOB      clients that each send requests at a steady pace, like open browser tabs
    python -m bench.load listen < JOB    clients that follow a stream of events, and what it takes to reach them all

JOB is a JSON document (`RateJob`, `TabsJob`, `ListenJob`), the result another on stdout. One thread, one epoll loop,
raw sockets, no client library. Its own cost is about 25 µs per plain request and 60 µs per stream of 64 tokens that
arrives in few pieces, so one core generates some 30,000 and 10,000 a second; `cpu_seconds` of the result says what it
used.
"""

from __future__ import annotations

import gzip
import heapq
import json
import random
import re
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from bench.wire import BLOCK, connect, is_last, is_whole

GRACE_SECONDS = 60.0
LATE_SECONDS = 30.0
LEAST_WAIT = 0.01
PAUSE_SECONDS = 0.2
"""Between two changes of state."""
MARK = re.compile(rb'<input type="hidden" class="shown"[^>]* name="(\w+)" value="([^"]*)"')
EVENT_NUMBER = re.compile(rb"^id: (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class RateJob:
    """`clients` connections that each repeat `request` for `seconds`, or send it once.

    A server so slow that not even one answer per client has arrived by then gets `LATE_SECONDS` more: answers to
    requests of the same moment arrive together, so a rate of fewer would be a matter of chance.
    `expect` is how often `data: ` must occur in each response at least: a stream that lost a token counts as an error.
    """

    port: int
    request: str
    clients: int
    seconds: float
    expect: int = 0
    once: bool = False


@dataclass(frozen=True, slots=True)
class RateResult:
    completed: int
    errors: int
    seconds: float
    cpu_seconds: float
    first_error: str = ""

    @property
    def per_second(self) -> float:
        return self.completed / self.seconds


@dataclass(frozen=True, slots=True)
class TabsJob:
    """`clients` connections that each send `requests` one after the other every `every` seconds, for `seconds`.

    Each starts at a random offset, because tabs are not opened in step. The first request is a page's poll: each sends
    in it the marks of what it was sent last.
    """

    port: int
    requests: Sequence[str]
    clients: int
    every: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TabsResult:
    """The seconds that each response took, per request of the job."""

    latencies: list[list[float]] = field(default_factory=list)
    errors: int = 0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ListenJob:
    """`clients` connections that follow the stream that `request` begins, then `events` changes of state, by `change`.

    `process` is the server's pid, whose processor time is measured.
    """

    port: int
    request: str
    change: str
    clients: int
    events: int
    process: int
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class ListenResult:
    """The seconds from sending each change to the last client's event; the processor seconds that the server took."""

    seconds: list[float]
    server_seconds: float


def run_rate(job: RateJob) -> RateResult:
    """Run the job in a process of its own."""
    return RateResult(**_in_a_process("rate", asdict(job), job.seconds))


def run_tabs(job: TabsJob) -> TabsResult:
    """Run the job in a process of its own."""
    return TabsResult(**_in_a_process("tabs", asdict(job), job.seconds))


def run_listen(job: ListenJob) -> ListenResult:
    """Run the job in a process of its own."""
    return ListenResult(**_in_a_process("listen", asdict(job), job.seconds))


def _in_a_process(kind: str, job: dict[str, object], seconds: float) -> Any:
    """Raises RuntimeError if the generator fails, or has not ended long after `seconds`."""
    argv, limit = [sys.executable, "-m", "bench.load", kind], seconds + GRACE_SECONDS
    try:
        done = subprocess.run(argv, input=json.dumps(job), capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the load generator did not end within {limit:.0f} s") from error
    if done.returncode:
        raise RuntimeError("".join(done.stderr.splitlines()[-1:]) or "the load generator failed")
    return json.loads(done.stdout)


class _Connections:
    """Open connections, and the epoll set that reports which of them are readable."""

    def __init__(self, port: int, count: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the usual 1024 open files would not be enough
        self._poll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.heard: dict[int, bytearray] = {}
        self._port = port
        for _ in range(count):
            self._open()

    def _open(self) -> int:
        connection = connect(self._port, GRACE_SECONDS)
        connection.setblocking(True)
        number = connection.fileno()
        self.sockets[number] = connection
        self.heard[number] = bytearray()
        self._poll.register(number, select.EPOLLIN)
        return number

    def _replace(self, number: int) -> int:
        """Open another connection for one that the server closes after this answer."""
        self._poll.unregister(number)
        self.sockets.pop(number).close()
        del self.heard[number]
        return self._open()

    def answers(self, timeout: float) -> list[tuple[int, bytearray]]:
        """Complete responses within `timeout`, by connection. Raises ConnectionError if the server hangs up."""
        whole = []
        for number, _ in self._poll.poll(timeout):
            heard = self.heard[number]
            data = self.sockets[number].recv(BLOCK)
            if not data:
                raise ConnectionError(f"the server hung up in mid-answer: {bytes(heard[-200:])!r}")
            heard += data
            if is_whole(heard):
                self.heard[number] = bytearray()
                closes = is_last(heard[: heard.find(b"\r\n\r\n")])
                whole.append((self._replace(number) if closes else number, heard))
        return whole

    def numbered_events(self, above: int) -> int:
        """Wait until each connection has an event numbered higher than `above`; return the highest number of any."""
        highest, waiting = above, set(self.sockets)
        while waiting:
            events = self._poll.poll(GRACE_SECONDS)
            if not events:
                raise TimeoutError(f"{len(waiting)} listeners got no event above {above}")
            for number, _ in events:
                heard = self.heard[number]
                heard += self.sockets[number].recv(BLOCK)
                if heard.endswith(b"\n\n\r\n"):
                    found = max((int(event[1]) for event in EVENT_NUMBER.finditer(heard)), default=0)
                    heard.clear()
                    highest = max(highest, found)
                    if found > above:
                        waiting.discard(number)
        return highest


def _rate(job: RateJob) -> RateResult:
    connections = _Connections(job.port, job.clients)
    request = job.request.encode("latin-1")
    completed = errors = 0
    first_error = ""
    began = time.perf_counter()
    deadline = began + job.seconds
    for client in connections.sockets.values():
        client.sendall(request)
    latest = deadline + LATE_SECONDS
    while (now := time.perf_counter()) < (deadline if completed + errors >= job.clients else latest):
        if job.once and completed + errors == job.clients:
            break
        for number, answer in connections.answers(max(LEAST_WAIT, deadline - now)):
            if answer.startswith(b"HTTP/1.1 200") and answer.count(b"data: ") >= job.expect:
                completed += 1
            else:
                errors += 1
                first_error = first_error or answer[:300].decode("latin-1")
            if not job.once:
                connections.sockets[number].sendall(request)
    return RateResult(completed, errors, time.perf_counter() - began, _cpu_seconds(), first_error)


def _tabs(job: TabsJob) -> TabsResult:
    connections = _Connections(job.port, job.clients)
    requests = [request.encode("latin-1") for request in job.requests]
    chance = random.Random(job.clients)
    began = time.perf_counter()
    due = [(began + chance.random() * job.every, number) for number in connections.sockets]
    heapq.heapify(due)
    asked: dict[int, tuple[int, float]] = {}
    polls: dict[int, bytes] = {}
    result: list[list[float]] = [[] for _ in requests]
    errors = 0
    while (now := time.perf_counter()) < began + job.seconds:
        while due and due[0][0] <= now:
            at, number = heapq.heappop(due)
            heapq.heappush(due, (at + job.every, number))
            if number in asked:
                errors += 1  # the request before has not been answered yet
                continue
            asked[number] = (0, time.perf_counter())
            connections.sockets[number].sendall(polls.get(number, requests[0]))
        for number, answer in connections.answers(max(0.0, due[0][0] - time.perf_counter())):
            step, sent = asked.pop(number)
            result[step].append(time.perf_counter() - sent)
            errors += not answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 204"))  # 204: nothing has changed
            if step == 0:
                polls[number] = _marked(polls.get(number, requests[0]), answer)
            if step + 1 < len(requests):
                asked[number] = (step + 1, time.perf_counter())
                connections.sockets[number].sendall(requests[step + 1])
    return TabsResult(result, errors, _cpu_seconds())


def _marked(poll: bytes, answer: bytes | bytearray) -> bytes:
    """The poll with the marks in an answer to it."""
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if b"Content-Encoding: gzip" in head:
        body = gzip.decompress(body)
    for name, mark in MARK.findall(body):
        poll = re.sub(rb"(?<=[?&]%b=)[^& ]*" % name, mark, poll, count=1)
    return poll


def _listen(job: ListenJob) -> ListenResult:
    listeners, changing = _Connections(job.port, job.clients), connect(job.port, GRACE_SECONDS)
    for listener in listeners.sockets.values():
        listener.sendall(job.request.encode("latin-1"))
    reached = listeners.numbered_events(0)
    seconds = []
    server = psutil.Process(job.process)
    used_before = processor_seconds(server)
    for _ in range(job.events):
        time.sleep(PAUSE_SECONDS)
        began = time.perf_counter()
        changing.sendall(job.change.encode("latin-1"))
        reached = listeners.numbered_events(reached)
        seconds.append(time.perf_counter() - began)
        changing.recv(BLOCK)  # its short answer, last: it may come after all events, which are read as they come
    return ListenResult(seconds, processor_seconds(server) - used_before)


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor time that a process has taken so far."""
    used = process.cpu_times()
    return float(used.user + used.system)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    job = json.load(sys.stdin)
    runs: Mapping[str, Callable[[], RateResult | TabsResult | ListenResult]] = {
        "rate": lambda: _rate(RateJob(**job)),
        "tabs": lambda: _tabs(TabsJob(**job)),
        "listen": lambda: _listen(ListenJob(**job)),
    }
    result = runs[sys.argv[1]]()
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
