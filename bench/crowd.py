"""A thousand streams at once: whether all of them complete, and the memory that each takes in the app.

Each client sends one request for a stream of 64 tokens, 100 ms apart, so that all streams are open together; the row
says how many the app counted at most. Memory is the growth of the worker's resident set up to its highest while they
run, in a console that has served a single stream before, so that nothing that others freed is used again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench import wire
from bench.figures import Row
from bench.load import RateJob, RateResult, run_rate
from bench.rig import FAKE_MODEL, Rig, end, worker
from bench.upstream import TOKENS
from tests.support.console import Console

STREAMS = 1000
PAUSE_MS = 100
LOOK_SECONDS = 0.1
SECONDS = 60.0
MESSAGES = [{"role": "user", "content": "Write sixty-four words about a crowd."}]


@dataclass(slots=True)
class Highest:
    """The most streams that the app counted as open, and the most memory that its worker held, in bytes."""

    streams: int = 0
    memory: int = 0


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.new_fake_engine_console().start()
    try:
        console.switch(FAKE_MODEL)
        yield _row(console, rig.times(STREAMS), rig.times(PAUSE_MS))
    finally:
        end(console)


def _row(console: Console, streams: int, pause_ms: int) -> Row:
    job = RateJob(console.port, _request(pause_ms), streams, SECONDS, expect=TOKENS + 1, once=True)
    run_rate(replace(job, request=_request(0), clients=1))
    before = worker(console).memory_info().rss
    result, highest = _run(console, job)
    each = (highest.memory - before) / streams
    whole = result.completed == streams and highest.streams == streams
    return Row(
        f"{streams:,} streams at once",
        f"{result.completed:,} complete, {highest.streams:,} open together, in {result.seconds:.1f} s "
        f"(their pauses alone take {TOKENS * pause_ms / 1000:.1f} s); {each / 1000:.0f} kB of memory each",
        "all complete",
        whole,
        {"completed": result.completed, "seconds": result.seconds, "kilobytes_each": each / 1000},
    )


def _request(pause_ms: int) -> str:
    body = {"model": FAKE_MODEL, "stream": True, "pause_ms": pause_ms, "messages": MESSAGES}
    return wire.post("/v1/chat/completions", body).decode()


def _run(console: Console, job: RateJob) -> tuple[RateResult, Highest]:
    """Run the job and look at the app meanwhile. Raises RuntimeError on a wrong answer."""
    over, highest = threading.Event(), Highest()

    def look() -> None:
        process = worker(console)
        while not over.wait(LOOK_SECONDS):
            highest.memory = max(highest.memory, process.memory_info().rss)
            highest.streams = max(highest.streams, console.model(FAKE_MODEL)["in_flight"])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        result = run_rate(job)
    finally:
        over.set()
        looking.join()
    if result.errors:
        raise RuntimeError(f"{result.errors} wrong answers, such as: {result.first_error}")
    return result, highest
