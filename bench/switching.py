"""Time until a model answers, compared with starting the same engine by hand.

A, by the app: `POST /v1/models/switch` with `wait`, then a chat completion of one token; nothing was loaded before.
B, by hand: the program that the app runs, started cold with the same instructions on stdin, then the same completion as
soon as it reports `ready`. A and B alternate, so that other load on the machine affects both; the figure is the ratio
of their medians. Before each switch the app has time to get its standby process ready (a second at most), as it has
between the switches of people, who look at an answer before they switch again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median

import psutil

from bench import wire
from bench.figures import Row, spread
from bench.rig import ROOT, Rig, end, wait_until, worker
from services.config import Settings
from services.engines.llamacpp.gguf import read_header
from services.engines.llamacpp.launch import PROGRAM, LoadRequest
from services.engines.port import HOST_DEVICE
from tests.support.console import Console

PAIRS = 15
STANDBY_AGE_SECONDS = 0.5
KEY = "bench"
QUESTION = {"max_tokens": 1, "temperature": 0, "messages": [{"role": "user", "content": "Hello"}]}


def measure(rig: Rig) -> Iterator[Row]:
    yield _row(rig, standby=True, target="<= 1.15, then below 1.0")
    yield _row(rig, standby=False, target="<= 1.15")


def _row(rig: Rig, *, standby: bool, target: str) -> Row:
    console = rig.console(standby=standby).start()
    try:
        by_app, by_hand = _alternate(rig, console, standby)
        held = _standby_bytes(console) if standby else None
    finally:
        end(console)
    ratio = median(by_app) / median(by_hand)
    note = f"; the standby process holds {held / 1e6:.0f} MB" if held else ""
    mode = "on" if standby else "off"
    return Row(
        f"switch to first token, embedded engine, over starting that engine by hand (standby {mode})",
        f"{ratio:.2f} ({spread(by_app, scale=1000)} ms against {spread(by_hand, scale=1000)} ms, "
        f"{len(by_app)} pairs{note})",
        target,
        ratio <= 1.15,
        {"ratio": ratio, "app_s": median(by_app), "by_hand_s": median(by_hand), "standby_bytes": held},
    )


def _alternate(rig: Rig, console: Console, standby: bool) -> tuple[list[float], list[float]]:
    """Seconds by the app and by hand. The first pair warms the page cache and isn't counted."""
    by_app, by_hand = [], []
    for _ in range(rig.times(PAIRS) + 1):
        if standby:
            wait_until(lambda: _stands_by(console), "the standby process")
        by_app.append(_by_app(console, rig.model_file.stem))
        by_hand.append(_by_hand(_load_request(rig)))
    return by_app[1:], by_hand[1:]


def _by_app(console: Console, model_id: str) -> float:
    with wire.Wire(console.port) as connection:
        began = time.perf_counter()
        connection.ask_well(wire.post("/v1/models/switch", {"target_model": model_id, "wait": True}))
        connection.ask_well(wire.post("/v1/chat/completions", {"model": model_id, **QUESTION}))
        took = time.perf_counter() - began
        connection.ask_well(wire.post(f"/v1/models/{model_id}/stop"))
    return took


def _by_hand(request: LoadRequest) -> float:
    """Start, send the load request, wait for `ready`, ask: what a shell script around the same program would do."""
    argv = [sys.executable, "-I", "-S", str(PROGRAM), sysconfig.get_paths()["platlib"]]
    said = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    began = time.perf_counter()
    with subprocess.Popen(argv, cwd=ROOT, text=True, **said) as engine:  # type: ignore[call-overload]
        try:
            engine.stdin.write(json.dumps({**asdict(request), "key": KEY}) + "\n")
            engine.stdin.flush()
            events = (json.loads(line) for line in engine.stdout)
            origin = next(event["origin"] for event in events if event["event"] == "ready")
            with wire.Wire(int(origin.rpartition(":")[2])) as connection:
                question = {"model": request.alias, **QUESTION}
                connection.ask_well(wire.post("/v1/chat/completions", question, Authorization=f"Bearer {KEY}"))
            return time.perf_counter() - began
        finally:
            engine.kill()


def _load_request(rig: Rig) -> LoadRequest:
    """The app's instructions to the engine for this model, with default settings."""
    settings, header = Settings(), read_header(rig.model_file)
    return LoadRequest(
        path=str(rig.model_file),
        mapped=not header.repacked_bytes,
        alias=rig.model_file.stem,
        context_length=min(settings.context_length, header.context_length or settings.context_length),
        parallel=settings.parallel_requests,
        threads=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        device=HOST_DEVICE,
    )


def _stands_by(console: Console) -> bool:
    engine = _standby(console)
    return engine is not None and time.time() - engine.create_time() > STANDBY_AGE_SECONDS


def _standby_bytes(console: Console) -> int:
    wait_until(lambda: _stands_by(console), "the standby process")
    engine = _standby(console)
    return engine.memory_info().rss if engine else 0


def _standby(console: Console) -> psutil.Process | None:
    """The app's standby process: its only engine while nothing is loaded; None unless there is exactly one."""
    engines = [child for child in worker(console).children() if PROGRAM.name in " ".join(child.cmdline())]
    return engines[0] if len(engines) == 1 else None
