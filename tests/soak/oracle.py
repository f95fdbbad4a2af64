"""The invariants at rest, and after the app has ended."""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from tests.soak.client import Client, ConnectionLost
from tests.soak.operations import HELLO, messages_of
from tests.soak.record import Record
from tests.soak.world import World

REST_SECONDS = 60.0
"""The longest until the console is at rest: a load that is never ready, and what is queued behind it."""
NOTICE_SECONDS = 2.0
"""The longest until the end of an engine is noticed. It was looked for in the very moment in which one crashed."""
SETTLE_SECONDS = 30.0
"""The longest until aborted connections are noticed: an event stream checks every ten seconds."""
COME_BACK_SECONDS = 15.0
"""The longest until loaded models are adopted after a start."""
STEADY_SECONDS, STEADY_LOOKS = 2.0, 5
"""Longer than the second between two polls of an engine."""
MOST = (150, 0, 40, 0)
"""Upper bounds at rest: descriptors, connections in CLOSE-WAIT, threads, messages with the state `streaming`."""
MORE_DESCRIPTORS, MORE_GREENLETS, MORE_MEGABYTES = 25, 25, 60
"""Allowed growth between two rests of the same worker: engines change, and learned data grows."""
TROUBLE = re.compile(
    r"Traceback|unforeseen|failed with an unexpected error|message to the switcher failed"
    r"|publishing after a message failed"
)
REASON = re.compile(r'<p class="trouble[^"]*">.*?<span>(.*?)</span>', re.DOTALL)
NO_REASON = "The engine ended the answer without a reason."


Loaded = tuple[object, ...]


@dataclass(frozen=True)
class Figures:
    """Resources of the app's worker at rest. `rss` is bytes, `streaming` the number of messages with that state."""

    pid: int
    rss: int
    descriptors: int
    close_wait: int
    threads: int
    greenlets: int
    streaming: int

    def __str__(self) -> str:
        return (
            f"worker {self.pid}: {self.rss / 1e6:.0f} MB, {self.descriptors} descriptors, {self.close_wait} in "
            f"CLOSE-WAIT, {self.threads} threads, {self.greenlets} greenlets; {self.streaming} rows streaming"
        )

    def since(self, before: Figures) -> str:
        """The current figures with their changes, as text."""
        return (
            f"{self.descriptors} descriptors ({self.descriptors - before.descriptors:+}), {self.close_wait} in "
            f"CLOSE-WAIT, {self.greenlets} greenlets ({self.greenlets - before.greenlets:+}), "
            f"{self.rss / 1e6:.0f} MB ({(self.rss - before.rss) / 1e6:+.0f}), {self.streaming} rows streaming"
        )

    def grown(self, before: Figures) -> str | None:
        """What has grown beyond the allowed variation since an earlier rest of the same worker, as text."""
        bounds = (
            ("descriptors", self.descriptors - before.descriptors, MORE_DESCRIPTORS),
            ("greenlets", self.greenlets - before.greenlets, MORE_GREENLETS),
            ("MB", (self.rss - before.rss) / 1e6, MORE_MEGABYTES),
        )
        return ", ".join(f"{more:.0f} {what} more" for what, more, most in bounds if more > most) or None


class Oracle:
    """Checks the console while all clients pause. Every violation is recorded."""

    def __init__(self, world: World, record: Record) -> None:
        self._world = world
        self._record = record
        self._client = Client(world, record)

    def check_rest(self) -> Figures | None:
        """Check every invariant at rest; None if the console does not answer."""
        self._client.doing = "at rest"
        try:
            status = self._wait_for_rest()
            self._check_instances(status)
            self._check_conversations()
        except ConnectionLost:
            self._violation("the console does not answer")
            return None
        finally:
            self._client.close()
        self._check_log()
        return self._settle()

    def check_survival(self, what: str, happens: Callable[[], None]) -> None:
        """Take the app down and up at rest; check that the same models are loaded in the same processes."""
        self._client.doing = f"after {what} at rest"
        before = self._steady()
        happens()
        if not self._await(lambda: self._loaded() == before, COME_BACK_SECONDS):
            self._violation(f"{what} at rest turned {before} into {self._loaded()}")
        self._client.close()

    def check_end(self) -> None:
        """Stop the app; check for orphans, for changes to other programs' models, and for errors in the log."""
        others = self._world.ollama.ps()
        began = time.monotonic()
        code = self._world.console.stop()
        seconds = time.monotonic() - began
        if code != 0 or seconds > REST_SECONDS:
            self._violation(f"the app exited with {code}, after {seconds:.0f} s")
        self._await(lambda: not self._world.processes(), 5)
        for process in self._world.processes():
            self._violation(f"an orphan is left: {_command(process)}")
        if self._world.ollama.ps() != others:
            self._violation(f"stopping the app turned Ollama's {others} into {self._world.ollama.ps()}")
        self._check_log()

    def _steady(self) -> Loaded:
        """What is loaded, once it is stable: asking an Ollama whose runner crashed unnoticed loads the model again."""
        now = self._loaded()
        for _ in range(STEADY_LOOKS):
            before = now
            time.sleep(STEADY_SECONDS)
            now = self._loaded()
            if now == before:
                return now
        self._violation(f"the loaded models change without a request: {before}, then {now}")
        return now

    def _loaded(self) -> Loaded:
        """The live engines, Ollama's loaded models, the models shown as running, and the active one."""
        status = self._client.get("/v1/models/status").json()
        running = sorted(name for name, model in status["models"].items() if model["status"] == "running")
        alive = [(model, process.pid) for model, process in self._world.engines()]
        return alive, self._world.ollama.ps(), running, status["active_model"]

    def _wait_for_rest(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def quiet() -> bool:
            seen["status"] = self._client.get("/v1/models/status").json()
            seen["switch"] = self._client.get("/v1/models/switch").json()
            moving = [m for m in seen["status"]["models"].values() if m["status"] in ("loading", "unloading")]
            busy = [m for m in seen["status"]["models"].values() if m["in_flight"]]
            return not (seen["switch"]["active"] or seen["switch"]["queue"] or moving or busy)

        if not self._await(quiet, REST_SECONDS):
            shown = {name: m for name, m in seen["status"]["models"].items() if m["status"] != "stopped"}
            self._violation(f"not at rest within {REST_SECONDS:.0f} s: {seen['switch']} {shown}")
        return dict(seen["status"])

    def _check_instances(self, status: dict[str, Any]) -> None:
        """Check that every live engine is shown, and that every model shown as running answers.

        One whose engine has only just crashed may be shown for NOTICE_SECONDS more.
        """

        def shown(engine: str) -> Counter[str]:
            now = self._client.get("/v1/models/status").json()["models"]
            return Counter(name for name, m in now.items() if m["engine"] == engine and m["status"] == "running")

        def alive() -> Counter[str]:
            return Counter(model for model, _ in self._world.engines())

        def is_gone(engine: str, name: str) -> bool:
            return name not in shown(engine)

        for engine, name in [(kind, name) for kind in ("llamacpp", "ollama") for name in shown(kind)]:
            answer = self._client.post("/v1/chat/completions", {"model": name, "messages": HELLO}, model=name)
            if answer.status_code != 200 and not self._await(partial(is_gone, engine, name), NOTICE_SECONDS):
                self._violation(f"{name} is shown as running, but answers {answer.status_code} {answer.text[:200]}")
        if not self._await(lambda: alive() == shown("llamacpp"), 5):
            self._violation(f"alive are {dict(alive())}, but shown as running {dict(shown('llamacpp'))}")
        if not self._await(lambda: Counter(self._world.ollama.ps()) == shown("ollama"), 5):
            self._violation(f"Ollama has loaded {self._world.ollama.ps()}, but shown is {dict(shown('ollama'))}")
        reserved = [device for device in status["gpu"]["devices"] if device["reserved_gb"]]
        if reserved:
            self._violation(f"memory is reserved without a load: {reserved}")

    def _check_conversations(self) -> None:
        """Check that every accepted message is stored, with its answer or the reason why there is none."""
        for conversation in list(self._world.conversations):
            if conversation.deleted:
                continue
            messages = messages_of(self._client, conversation)
            said = [_text_of(inside) for _, kind, inside in messages if kind == "user"]
            for text in conversation.accepted:
                if said.count(text) != 1:
                    self._violation(f"{text!r} is {said.count(text)} times in conversation {conversation.id}")
            for (_, kind, inside), (_, after, answer) in zip(messages, [*messages[1:], ("", "none", "")], strict=True):
                if kind == "user" and _text_of(inside) in conversation.accepted:
                    self._check_answer(_text_of(inside), after, answer)

    def _check_answer(self, question: str, kind: str, inside: str) -> None:
        reason = REASON.search(inside)
        if kind == "assistant streaming":
            self._violation(f"the answer to {question!r} is still being written")
        elif not kind.startswith("assistant"):
            self._violation(f"{question!r} has no answer: {kind}")
        elif kind == "assistant failed" and (reason is None or reason[1] in ("", NO_REASON)):
            self._violation(f"the answer to {question!r} failed without a reason")
        elif kind == "assistant complete" and '<div class="prose">' not in inside:
            self._violation(f"the answer to {question!r} is complete, and empty")

    def _check_log(self) -> None:
        found = TROUBLE.search(said := self._world.console.output())
        if found is not None:
            self._violation(f"the console's log: {said[max(0, found.start() - 300) : found.end() + 1500]}")

    def _settle(self) -> Figures:
        """The worker's figures, once it has noticed aborted connections."""
        self._await(lambda: not self._too_much(self._figures()), SETTLE_SECONDS)
        figures = self._figures()
        if self._too_much(figures):
            self._violation(f"the worker holds too much: {figures}")
        return figures

    def _too_much(self, figures: Figures) -> bool:
        held = (figures.descriptors, figures.close_wait, figures.threads, figures.streaming)
        return any(n > most for n, most in zip(held, MOST, strict=True))

    def _figures(self) -> Figures:
        worker = self._world.worker
        links = worker.net_connections(kind="tcp")
        waiting = sum(link.status == psutil.CONN_CLOSE_WAIT for link in links)
        return Figures(
            worker.pid,
            worker.memory_info().rss,
            worker.num_fds(),
            waiting,
            worker.num_threads(),
            self._world.faults.greenlets(worker),
            self._streaming(),
        )

    def _streaming(self) -> int:
        """The number of rows with the state `streaming`."""
        database = f"{self._world.faults.database.as_uri()}?mode=ro"
        with closing(sqlite3.connect(database, uri=True, timeout=60)) as connection:
            count = connection.execute("SELECT count(*) FROM messages WHERE state = 'streaming'").fetchone()
        return int(count[0])

    def _await(self, condition: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _violation(self, words: str) -> None:
        self._record.violation(f"at rest after {self._record.done} operations: {words}")


def _text_of(inside: str) -> str:
    said = re.search(r'<p class="said"[^>]*>(.*?)</p>', inside, re.DOTALL)
    return said[1] if said is not None else ""


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())}"
    return str(process.pid)
