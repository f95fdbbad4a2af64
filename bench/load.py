"""The load generator: a process of its own, so that it never waits for what it measures, nor the other way round.

    python -m bench.load rate < JOB      as many requests as can be had, a number of clients at once
    python -m bench.load tabs < JOB      clients that each ask in turn at a steady pace, as open browser tabs do

JOB is a JSON document (`RateJob`, `TabsJob`), the answer another on stdout. One thread, one epoll loop, raw sockets,
standard library only. What it costs: about 25 µs a non-streamed request and 60 µs a stream of 64 tokens when those come
in few pieces, so some 30,000 and 10,000 a second on a core of its own; `cpu_seconds` of the answer says what it took.
"""

from __future__ import annotations

import heapq
import json
import random
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.wire import BLOCK, is_whole

GRACE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class RateJob:
    """`clients` connections that each repeat `request` for `seconds`, `at_most` in all.

    `expect` is how often `data: ` has to occur in each answer: a stream that lost a token is an error.
    """

    port: int
    request: str
    clients: int
    seconds: float
    at_most: int = 1_000_000
    expect: int = 0


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
    """`clients` connections that send `requests` one after the other every `every` seconds, for `seconds`.

    Each begins at a moment of its own: tabs are not opened in step.
    """

    port: int
    requests: Sequence[str]
    clients: int
    every: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TabsResult:
    """The seconds that each answer took, per request of the job."""

    latencies: list[list[float]] = field(default_factory=list)
    errors: int = 0
    cpu_seconds: float = 0.0


def run_rate(job: RateJob) -> RateResult:
    """Carry the job out in a process of its own."""
    return RateResult(**_in_a_process("rate", asdict(job), job.seconds))


def run_tabs(job: TabsJob) -> TabsResult:
    """Carry the job out in a process of its own."""
    return TabsResult(**_in_a_process("tabs", asdict(job), job.seconds))


def _in_a_process(kind: str, job: dict[str, object], seconds: float) -> Any:
    argv = [sys.executable, "-m", "bench.load", kind]
    done = subprocess.run(
        argv, input=json.dumps(job), capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout)


class _Connections:
    """Open connections, and the epoll set that says which of them have something to read."""

    def __init__(self, port: int, count: int) -> None:
        self._poll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.heard: dict[int, bytearray] = {}
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), GRACE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(True)
            self.sockets[connection.fileno()] = connection
            self.heard[connection.fileno()] = bytearray()
            self._poll.register(connection.fileno(), select.EPOLLIN)

    def answers(self, timeout: float) -> list[tuple[int, bytearray]]:
        """Whole answers that came within `timeout`, by connection. Raises ConnectionError when a server hangs up."""
        whole = []
        for number, _ in self._poll.poll(timeout):
            heard = self.heard[number]
            data = self.sockets[number].recv(BLOCK)
            if not data:
                raise ConnectionError(f"the server hung up in mid-answer: {bytes(heard[-200:])!r}")
            heard += data
            if is_whole(heard):
                whole.append((number, heard))
                self.heard[number] = bytearray()
        return whole


def _rate(job: RateJob) -> RateResult:
    connections = _Connections(job.port, job.clients)
    request = job.request.encode("latin-1")
    completed = errors = 0
    first_error = ""
    began = time.perf_counter()
    deadline = began + job.seconds
    for client in connections.sockets.values():
        client.sendall(request)
    while (now := time.perf_counter()) < deadline and completed + errors < job.at_most:
        for number, answer in connections.answers(deadline - now):
            if answer.startswith(b"HTTP/1.1 200") and answer.count(b"data: ") == job.expect:
                completed += 1
            else:
                errors += 1
                first_error = first_error or answer[:300].decode("latin-1")
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
    result: list[list[float]] = [[] for _ in requests]
    errors = 0
    while (now := time.perf_counter()) < began + job.seconds:
        while due and due[0][0] <= now:
            at, number = heapq.heappop(due)
            heapq.heappush(due, (at + job.every, number))
            if number in asked:
                errors += 1  # still without an answer from the last time
                continue
            asked[number] = (0, time.perf_counter())
            connections.sockets[number].sendall(requests[0])
        for number, answer in connections.answers(max(0.0, due[0][0] - time.perf_counter())):
            step, sent = asked.pop(number)
            result[step].append(time.perf_counter() - sent)
            errors += not answer.startswith(b"HTTP/1.1 200")
            if step + 1 < len(requests):
                asked[number] = (step + 1, time.perf_counter())
                connections.sockets[number].sendall(requests[step + 1])
    return TabsResult(result, errors, _cpu_seconds())


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    job = json.load(sys.stdin)
    result = _rate(RateJob(**job)) if sys.argv[1] == "rate" else _tabs(TabsJob(**job))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
