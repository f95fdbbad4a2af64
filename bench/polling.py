"""Latency with a hundred and a thousand open tabs, how fast events reach a thousand listeners, and the app's memory
before and after that. In a full run, "before" is after all of the relayed requests.

Each tab shows a conversation and polls every 2 s, as the page does while something is in progress: first the page's
fragment, at the URL that the page itself names, then `/v1/models/status`. Times are those of `/v1/models/status`, from
sending the request to the end of the response, on a kept-alive connection; the tabs start at random offsets.

Each listener follows `/v1/events`. An event's time is from sending the request that changes the state to the last
listener's whole event.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from statistics import median
from urllib.parse import urlencode

import psutil

from bench import wire
from bench.figures import Row, percentile, spread
from bench.load import ListenJob, TabsJob, processor_seconds, run_listen, run_tabs
from bench.rig import Rig, worker
from tests.support.console import Console, wait_until

TABS = (100, 1000)
EVERY_SECONDS = 2.0
SECONDS = 20.0
TARGET_P99_MS = 10.0
LISTENERS = 1000
EVENTS = 30
TARGET_EVENT_MS = 50.0
DISMISS = "/models/dismiss"
"""A request that only makes a new version of the state."""
TARGET_MB = 80.0


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.fake_engine_console
    yield _memory(console, "after the relayed requests", TARGET_MB)
    console.post(DISMISS)  # so that no banner about the switch goes away while the tabs poll
    console.http.post(f"{console.url}/chats", data={"text": "Hello"})
    wait_until(lambda: "sse-connect" not in console.get("/").text, "the answer")
    for tabs in TABS:
        yield _status(console, tabs, rig.seconds(SECONDS))
    yield _events(console, rig.times(EVENTS))
    yield _memory(console, "after a thousand tabs and listeners")


def _status(console: Console, tabs: int, seconds: float) -> Row:
    fragment = wire.get(_polled_path(console), HX_Request="true", Accept_Encoding="gzip").decode()
    status = wire.get("/v1/models/status").decode()
    used_before = processor_seconds(worker(console))
    result = run_tabs(TabsJob(console.port, [fragment, status], tabs, EVERY_SECONDS, seconds))
    if result.errors:
        raise RuntimeError(f"{result.errors} looks were answered late or wrongly")
    fragments, statuses = ([1000 * latency for latency in taken] for taken in result.latencies)
    p50, p99 = median(statuses), percentile(statuses, 99)
    cpu_us = 1e6 * (processor_seconds(worker(console)) - used_before) / (len(fragments) + len(statuses))
    return Row(
        f"`/v1/models/status` p99, {tabs:,} tabs polling",
        f"{p99:.1f} ms, p50 {p50:.1f} ms ({len(statuses)} looks; the page's fragment "
        f"{percentile(fragments, 99):.1f} ms, p50 {median(fragments):.1f} ms; {cpu_us:.0f} µs of processor each)",
        f"< {TARGET_P99_MS:.0f} ms",
        p99 < TARGET_P99_MS,
        {
            "p50_ms": p50,
            "p99_ms": p99,
            "fragment_p50_ms": median(fragments),
            "looks": len(statuses),
            "cpu_us": cpu_us,
        },
    )


def _events(console: Console, events: int) -> Row:
    listen = wire.get("/v1/events", Accept="text/event-stream").decode()
    change = wire.post(DISMISS, HX_Request="true").decode()
    result = run_listen(ListenJob(console.port, listen, change, LISTENERS, events, worker(console).pid))
    last = [1000 * seconds for seconds in result.seconds]
    cpu_us = 1e6 * result.server_seconds / (events * LISTENERS)
    return Row(
        f"an event reaches the last of {LISTENERS:,} listeners to `/v1/events`",
        f"{spread(last)} ms ({events} events; {cpu_us:.0f} µs of processor per listener)",
        f"< {TARGET_EVENT_MS:.0f} ms",
        median(last) < TARGET_EVENT_MS,
        {"last_ms": median(last), "cpu_us": cpu_us},
    )


def _polled_path(console: Console) -> str:
    """The URL that the page polls, with the versions that the page says it already shows."""
    page = console.get("/").text
    found = re.search(r'id="poll"\s+hx-get="([^"]+)"', page)
    if found is None:
        raise LookupError("the page names no URL to poll")
    shown = re.findall(r'<input type="hidden" class="shown"[^>]* name="(\w+)" value="([^"]*)"', page)
    path = html.unescape(found[1])
    return f"{path}{'&' if '?' in path else '?'}{urlencode(shown)}"


def _memory(console: Console, when: str, target: float | None = None) -> Row:
    assert console.process is not None
    workers = worker(console).memory_info().rss / 1e6
    master = psutil.Process(console.process.pid).memory_info().rss / 1e6
    return Row(
        f"app's own memory {when}",
        f"{workers:.0f} MB; {workers + master:.0f} MB with gunicorn's master, what they share counted twice",
        "–" if target is None else f"< {target:.0f} MB",
        None if target is None else workers < target,
        {"worker_mb": workers, "master_mb": master},
    )
