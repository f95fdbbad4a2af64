"""Cost of the gateway: the same requests through it, directly to the fake engine, and through other gateways, in turns.

The engine of these rows is `upstream.py`, because a real one would take nearly all of the time and would refuse direct
requests without its key. Other gateways on the PATH (`peers.py`) get the same load in front of the same fake engine;
"over" them is Switchyard's figure divided by theirs.

Added time: one client on a kept-alive connection; streams of four tokens 2 ms apart (no engine is faster, and without a
pause the rest of the stream would compete with its first token for the processors), 1 ms between requests, the order of
the routes rotating. The figure is the difference of the percentiles, not a percentile of differences.

Rates: 32 clients without a pause from `load.py`, in rounds that take turns; the ratio is of the medians. The load
generator, the app and the engine share the machine's processors, so with two processors the ratio can't reach 1.
"µs of processor" is the processor time of the app's worker per request: the figure that other load disturbs least.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

import psutil

from bench import wire
from bench.figures import Row, percentile, spread
from bench.load import RateJob, processor_seconds, run_rate
from bench.peers import PEERS, PeerError
from bench.rig import FAKE_MODEL, Rig, upstream_port, worker
from bench.upstream import TOKENS

REQUESTS = 600
WARM_UP_REQUESTS = 100
CLIENTS = 32
ROUNDS = 5
ROUND_SECONDS = 1.5
PAUSE_SECONDS = 0.001
MESSAGES = [{"role": "user", "content": "Write sixty-four words about a railway station."}]
DIRECT, GATEWAY = "direct", "gateway"
REASON_LENGTH = 200

TARGET_P50_MS = 0.8
TARGET_OF_DIRECT = 0.6
TARGET_STREAM_US, TARGET_PLAIN_US = 260, 120
LLAMA_SWAP = "llama-swap"
TARGET_ADDED_OVER, TARGET_STREAMS_OVER, TARGET_PLAIN_OVER = 0.7, 1.3, 2.0
"""Targets over llama-swap; the other gateways have none."""


@dataclass(slots=True)
class Routes:
    """The ports to which the same request is sent: the engine's own, the gateway's, and those of other gateways.

    `failed` says of a gateway that is not measured, or not to the end, why.
    """

    ports: dict[str, int]
    worker: psutil.Process
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, route: str, reason: object) -> None:
        """Leave another gateway out from now on. Raises RuntimeError if it is the engine or Switchyard itself."""
        if route in (DIRECT, GATEWAY):
            raise RuntimeError(f"{route}: {reason}")
        told = " ".join(str(reason).split())[:REASON_LENGTH].replace("|", "/")  # one cell of the table
        print(f"{route} failed: {told}", file=sys.stderr)
        self.ports.pop(route, None)
        self.failed[route] = told


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests per second of each round, by route; the microseconds of processor that the worker took for each."""

    per_second: Mapping[str, list[float]]
    cpu_us: float

    def over(self, route: str) -> float:
        return median(self.per_second[GATEWAY]) / median(self.per_second[route])


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.fake_engine_console
    engine = upstream_port(console, FAKE_MODEL)
    routes = Routes({DIRECT: engine, GATEWAY: console.port}, worker(console))
    with ExitStack() as running:
        for peer in PEERS:
            if peer.found is not None:
                try:
                    routes.ports[peer.name] = running.enter_context(peer.running(rig, engine))
                except PeerError as error:
                    routes.drop(peer.name, error)
        first_tokens = _first_tokens(rig, routes)
        streams = _rates(rig, routes, stream=True)
        plain = _rates(rig, routes, stream=False)
    yield _added_time(first_tokens)
    yield _streams(streams)
    yield _plain(plain)
    yield from _over_others(routes, first_tokens, streams, plain)


def _added_time(seconds: Mapping[str, list[float]]) -> Row:
    p50, p95 = (_added_ms(seconds, GATEWAY, percent) for percent in (50, 95))
    direct, gateway = (1000 * percentile(seconds[route], 50) for route in (DIRECT, GATEWAY))
    return Row(
        "added time to first token of a relayed stream, one client",
        f"{p50:.2f} ms p50, {p95:.2f} ms p95 ({gateway:.2f} ms against {direct:.2f} ms direct, "
        f"{len(seconds[GATEWAY])} requests each)",
        f"<= {TARGET_P50_MS} ms p50, then <= 0.5",
        p50 <= TARGET_P50_MS,
        {"added_p50_ms": p50, "added_p95_ms": p95, "direct_p50_ms": direct, "gateway_p50_ms": gateway},
    )


def _streams(rates: Rates) -> Row:
    return Row(
        f"relayed streams/s of {TOKENS} tokens, {CLIENTS} at once",
        _told(rates),
        f">= {TARGET_OF_DIRECT} of direct, <= {TARGET_STREAM_US} µs each",
        rates.over(DIRECT) >= TARGET_OF_DIRECT and rates.cpu_us <= TARGET_STREAM_US,
        _values(rates),
    )


def _plain(rates: Rates) -> Row:
    return Row(
        f"non-streamed requests/s, {CLIENTS} at once",
        _told(rates),
        f"<= {TARGET_PLAIN_US} µs each",
        rates.cpu_us <= TARGET_PLAIN_US,
        _values(rates),
    )


def _told(rates: Rates) -> str:
    return (
        f"{spread(rates.per_second[GATEWAY])}/s at {rates.cpu_us:.0f} µs of processor each, "
        f"{rates.over(DIRECT):.2f} of direct's {spread(rates.per_second[DIRECT])}/s"
    )


def _values(rates: Rates) -> Mapping[str, float | None]:
    by_route = {f"{route}_per_s": median(taken) for route, taken in rates.per_second.items()}
    return {"of_direct": rates.over(DIRECT), "cpu_us": rates.cpu_us, **by_route}


def _over_others(
    routes: Routes, first_tokens: Mapping[str, list[float]], streams: Rates, plain: Rates
) -> Iterator[Row]:
    """The ratios to each other gateway, or why there are none."""
    for peer in PEERS:
        if peer.name in routes.failed:
            yield Row(f"over {peer.name}", f"not measured: {routes.failed[peer.name]}", "–")
        elif peer.name in routes.ports:
            targeted = peer.name == LLAMA_SWAP
            yield _added_over(peer.name, first_tokens, targeted)
            yield _rate_over(peer.name, f"streams/s of {TOKENS} tokens", streams, TARGET_STREAMS_OVER, targeted)
            yield _rate_over(peer.name, "non-streamed requests/s", plain, TARGET_PLAIN_OVER, targeted)
    absent = [peer.name for peer in PEERS if peer.name not in routes.ports and peer.name not in routes.failed]
    if absent:
        yield Row("over other gateways", f"not on the PATH: {', '.join(absent)}", "–")


def _added_over(peer: str, seconds: Mapping[str, list[float]], targeted: bool) -> Row:
    own, other = (_added_ms(seconds, route, 50) for route in (GATEWAY, peer))
    ratio = own / other
    return Row(
        f"over {peer}: added time to first token, one client",
        f"{ratio:.2f} ({own:.2f} ms against {other:.2f} ms p50, {_added_ms(seconds, peer, 95):.2f} ms p95)",
        f"<= {TARGET_ADDED_OVER}" if targeted else "–",
        ratio <= TARGET_ADDED_OVER if targeted else None,
        {"ratio": ratio, "own_ms": own, "other_ms": other},
    )


def _rate_over(peer: str, what: str, rates: Rates, target: float, targeted: bool) -> Row:
    ratio = rates.over(peer)
    return Row(
        f"over {peer}: {what}, {CLIENTS} at once",
        f"{ratio:.3g} ({median(rates.per_second[GATEWAY]):.0f}/s against {spread(rates.per_second[peer])}/s)",
        f">= {target}" if targeted else "–",
        ratio >= target if targeted else None,
        {"ratio": ratio},
    )


def _first_tokens(rig: Rig, routes: Routes) -> Mapping[str, list[float]]:
    """Seconds to the first token of each request, per route."""
    body = {"model": FAKE_MODEL, "stream": True, "max_tokens": 4, "pause_ms": 2, "messages": MESSAGES}
    request = wire.post("/v1/chat/completions", body)
    warm_up = rig.times(WARM_UP_REQUESTS)
    seconds: dict[str, list[float]] = {route: [] for route in routes.ports}
    with ExitStack() as opened:
        open_routes = {route: opened.enter_context(wire.Wire(port)) for route, port in routes.ports.items()}
        order = list(open_routes)
        for _ in range(warm_up + rig.times(REQUESTS)):
            for route in [route for route in order if route in routes.ports]:
                try:
                    seconds[route].append(open_routes[route].ask_well(request).first)
                except (OSError, wire.WireError) as error:
                    routes.drop(route, error)
                time.sleep(PAUSE_SECONDS)
            order.append(order.pop(0))
    return {route: seconds[route][warm_up:] for route in routes.ports}


def _added_ms(seconds: Mapping[str, list[float]], route: str, percent: float) -> float:
    return 1000 * (percentile(seconds[route], percent) - percentile(seconds[DIRECT], percent))


def _rates(rig: Rig, routes: Routes, *, stream: bool) -> Rates:
    """Raises RuntimeError on a wrong response of the engine or Switchyard; another gateway is left out."""
    body = {"model": FAKE_MODEL, "stream": stream, "messages": MESSAGES}
    request = wire.post("/v1/chat/completions", body).decode()
    expect = TOKENS + 1 if stream else 0
    per_second: dict[str, list[float]] = {route: [] for route in routes.ports}
    used_before, relayed = processor_seconds(routes.worker), 0
    for _ in range(rig.times(ROUNDS)):
        for route, port in list(routes.ports.items()):
            try:
                result = run_rate(RateJob(port, request, CLIENTS, rig.seconds(ROUND_SECONDS), expect=expect))
            except RuntimeError as error:
                routes.drop(route, error)
                continue
            if result.errors:
                routes.drop(route, f"{result.errors} wrong answers, such as: {result.first_error}")
            elif not result.completed:
                routes.drop(route, f"no answer within {result.seconds:.0f} s")
            per_second[route].append(result.per_second)
            relayed += result.completed if route == GATEWAY else 0
    cpu_us = 1e6 * (processor_seconds(routes.worker) - used_before) / relayed
    return Rates({route: per_second[route] for route in routes.ports}, cpu_us)
