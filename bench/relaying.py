"""Cost of the gateway: the same requests through it and directly to the fake engine, in turns.

The engine of these rows is `upstream.py`, because a real one would take nearly all of the time and would refuse direct
requests without its key. If `llama-swap` is on the PATH, it is measured in turn as well, in front of its own fake
engine.

Added time: one client on a kept-alive connection; streams of four tokens 2 ms apart (no engine is faster, and without a
pause the rest of the stream would compete with its first token for the processors), 1 ms between requests, the order of
the routes rotating. The figure is the difference of the percentiles, not a percentile of differences.

Rates: 32 clients without a pause from `load.py`, in rounds that take turns; the ratio is of the medians. The load
generator, the app and the engine share the machine's processors, so with two processors the ratio can't reach 1.
"µs of processor" is the processor time of the app's worker per request: the figure that other load disturbs least.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import psutil

from bench import wire
from bench.figures import Row, percentile, spread
from bench.load import RateJob, run_rate
from bench.rig import FAKE_MODEL, Rig, upstream_port, worker
from bench.upstream import TOKENS

REQUESTS = 600
WARM_UP_REQUESTS = 100
TARGET_P50_MS = 0.8
CLIENTS = 32
ROUNDS = 5
ROUND_SECONDS = 1.5
PAUSE_SECONDS = 0.001
MESSAGES = [{"role": "user", "content": "Write sixty-four words about a railway station."}]


@dataclass(frozen=True, slots=True)
class Routes:
    """The ports to which the same request is sent: the engine's own, the gateway's, and llama-swap's."""

    direct: int
    gateway: int
    llama_swap: int | None
    worker: psutil.Process

    def __iter__(self) -> Iterator[tuple[str, int]]:
        yield "direct", self.direct
        yield "gateway", self.gateway
        if self.llama_swap is not None:
            yield "llama_swap", self.llama_swap


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.fake_engine_console
    routes = Routes(upstream_port(console, FAKE_MODEL), console.port, rig.llama_swap_port, worker(console))
    yield _added_time(routes)
    yield _rate(routes, f"relayed streams/s of {TOKENS} tokens, {CLIENTS} at once", stream=True, over_llama_swap=1.1)
    yield _rate(routes, f"non-streamed requests/s, {CLIENTS} at once", stream=False, over_llama_swap=0.6)


def _added_time(routes: Routes) -> Row:
    seconds = _first_tokens(routes)
    added = {p: _added_ms(seconds, "gateway", p) for p in (50, 95)}
    direct, gateway = (1000 * percentile(seconds[route], 50) for route in ("direct", "gateway"))
    other = _llama_swap_added(seconds)
    return Row(
        "added time to first token of a relayed stream, one client",
        f"{added[50]:.2f} ms p50, {added[95]:.2f} ms p95 ({gateway:.2f} ms against {direct:.2f} ms direct, "
        f"{REQUESTS} requests each); llama-swap {other}",
        f"<= {TARGET_P50_MS} ms p50, then <= 0.5",
        added[50] <= TARGET_P50_MS,
        {
            "added_p50_ms": added[50],
            "added_p95_ms": added[95],
            "direct_p50_ms": direct,
            "gateway_p50_ms": gateway,
            "llama_swap_added_p50_ms": _added_ms(seconds, "llama_swap", 50) if "llama_swap" in seconds else None,
        },
    )


def _first_tokens(routes: Routes) -> Mapping[str, list[float]]:
    """Seconds to the first token of each request, per route."""
    body = {"model": FAKE_MODEL, "stream": True, "max_tokens": 4, "pause_ms": 2, "messages": MESSAGES}
    request = wire.post("/v1/chat/completions", body)
    seconds: dict[str, list[float]] = {route: [] for route, _ in routes}
    with ExitStack() as opened:
        open_routes = [(route, opened.enter_context(wire.Wire(port))) for route, port in routes]
        for _ in range(WARM_UP_REQUESTS + REQUESTS):
            for route, connection in open_routes:
                seconds[route].append(connection.ask_well(request).first)
                time.sleep(PAUSE_SECONDS)
            open_routes.append(open_routes.pop(0))
    return {route: taken[WARM_UP_REQUESTS:] for route, taken in seconds.items()}


def _added_ms(seconds: Mapping[str, list[float]], route: str, percent: float) -> float:
    return 1000 * (percentile(seconds[route], percent) - percentile(seconds["direct"], percent))


def _llama_swap_added(seconds: Mapping[str, list[float]]) -> str:
    if "llama_swap" not in seconds:
        return "not installed here"
    return f"{_added_ms(seconds, 'llama_swap', 50):.2f} ms p50, {_added_ms(seconds, 'llama_swap', 95):.2f} ms p95"


def _rate(routes: Routes, figure: str, *, stream: bool, over_llama_swap: float) -> Row:
    rates, cpu_us = _rates(routes, stream)
    middle = {route: median(taken) for route, taken in rates.items()}
    of_direct = middle["gateway"] / middle["direct"]
    of_other = middle["gateway"] / middle["llama_swap"] if "llama_swap" in middle else None
    if of_other is None:
        other = "llama-swap not installed here"
    else:
        other = f"{of_other:.2f} of llama-swap's {spread(rates['llama_swap'])}/s"
    return Row(
        figure,
        f"{spread(rates['gateway'])}/s at {cpu_us:.0f} µs of processor each, "
        f"{of_direct:.2f} of direct's {spread(rates['direct'])}/s; {other}",
        f">= {over_llama_swap} of llama-swap",
        None if of_other is None else of_other >= over_llama_swap,
        {
            "of_direct": of_direct,
            "of_llama_swap": of_other,
            "cpu_us": cpu_us,
            **{f"{route}_per_s": rate for route, rate in middle.items()},
        },
    )


def _rates(routes: Routes, stream: bool) -> tuple[Mapping[str, list[float]], float]:
    """Requests per second of each round, and the worker's µs per request. Raises RuntimeError on a wrong response."""
    body = {"model": FAKE_MODEL, "stream": stream, "messages": MESSAGES}
    request = wire.post("/v1/chat/completions", body).decode()
    expect = TOKENS + 1 if stream else 0
    rates: dict[str, list[float]] = {route: [] for route, _ in routes}
    used_before, relayed = _processor_seconds(routes.worker), 0
    for _ in range(ROUNDS):
        for route, port in routes:
            result = run_rate(RateJob(port, request, CLIENTS, ROUND_SECONDS, expect=expect))
            if result.errors:
                raise RuntimeError(f"{result.errors} wrong answers by {route}, such as: {result.first_error}")
            rates[route].append(result.per_second)
            relayed += result.completed if route == "gateway" else 0
    return rates, 1e6 * (_processor_seconds(routes.worker) - used_before) / relayed


def _processor_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)
