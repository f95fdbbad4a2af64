"""The loaded models: loads on demand, evicts, unloads what has expired.

As in Ollama 0.24.0, models are identified by their weights file: a derived model and its parent are never loaded side
by side; if both have the same options, one runner serves both, listed under the name it was loaded by.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .library import Installed, Library
from .logs import log
from .settings import Settings
from .wire import FOR_EVER, SECOND, parse_duration

SCRIPT = Path(__file__).resolve().parents[1] / "ollama.py"
MISSING_TENSOR = "error loading model: missing tensor 'blk.2.attn_k.weight'\npanic: unable to load model: "
LOOK = 0.02
"""Seconds between two polls of a client or a runner that is being waited for."""
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
FREED_AFTER = 0.008
"""Seconds from a model's expiry to its absence from /api/ps (3 to 50 ms in the real one)."""


class ClientGone(Exception):
    """The client closed its connection while it waited."""


class LoadFailed(Exception):
    """The text is the server's error."""


@dataclass(eq=False)
class Runner:
    model: Installed
    key: str
    asked: tuple[object, ...]
    context_length: int
    process: subprocess.Popen[bytes]
    keep_alive: int
    expires_ns: int = 0
    users: int = 1
    ready: bool = False
    told: str = ""
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        return self.model.options.loaded_size or int(self.model.manifest.size * 1.35)

    @property
    def size_vram(self) -> int:
        return int(self.size * self.model.options.vram_share)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Scheduler:
    def __init__(self, library: Library, settings: Settings) -> None:
        self._library = library
        self._settings = settings
        self._changed = threading.Condition()
        self._runners: dict[str, Runner] = {}
        threading.Thread(target=self._expire, daemon=True).start()

    def loaded(self) -> list[Runner]:
        """The models that /api/ps lists: not those that are still loading."""
        with self._changed:
            return sorted((r for r in self._runners.values() if r.ready), key=lambda r: r.expires_ns, reverse=True)

    def acquire(self, model: Installed, options: dict[str, Any], keep: int | None, gone: Callable[[], bool]) -> Runner:
        """Load the model if necessary and add a user; `release` removes it. Raises LoadFailed and ClientGone."""
        key = model.manifest.weights.file_name if model.manifest.weights else model.digest
        merged = {**model.parameters, **options}
        context = int(merged.get("num_ctx") or int(os.environ.get("OLLAMA_CONTEXT_LENGTH") or 0) or 4096)
        # Spelling out the server's default does not make other options.
        asked = tuple({**merged, "num_ctx": context}.get(name) for name in RUNNER_OPTIONS)
        while True:
            if gone():
                raise ClientGone
            with self._changed:
                runner = self._runners.get(key)
                if runner is not None and runner.process.poll() is not None and runner.ready and not runner.users:
                    self._free(runner)
                elif runner is not None and self._is_leaving(runner):
                    self._changed.wait(LOOK)
                elif runner is not None and runner.ready and runner.asked == asked:
                    runner.users += 1
                    runner.keep_alive = runner.keep_alive if keep is None else keep
                    return runner
                elif runner is not None and (runner.users or not runner.ready):
                    self._changed.wait(LOOK)
                elif runner is not None:
                    self._free(runner)
                elif len(self._runners) < self._max_loaded():
                    runner = self._start(model, key, asked, context, keep)
                    break
                else:
                    self._evict_one()
        try:
            self._load(runner, gone)
        except (ClientGone, LoadFailed):
            with self._changed:
                self._free(runner)
            raise
        return runner

    def release(self, runner: Runner) -> None:
        """Remove a user: the keep-alive time starts again, unless an unload was requested meanwhile."""
        with self._changed:
            runner.users -= 1
            runner.idle_since = time.monotonic()
            if runner.keep_alive:
                runner.expires_ns = time.time_ns() + runner.keep_alive
            else:
                runner.expires_ns = runner.expires_ns or time.time_ns()
            self._changed.notify_all()

    def unload(self, model: Installed) -> None:
        """Request its end: at once if idle, otherwise when its last user is done."""
        key = model.manifest.weights.file_name if model.manifest.weights else model.digest
        with self._changed:
            runner = self._runners.get(key)
            if runner is not None:
                runner.keep_alive = 0
                runner.expires_ns = time.time_ns()
                self._changed.notify_all()

    def end(self) -> None:
        """End every runner with the server. Takes no lock: it may be called from a signal handler."""
        for runner in list(self._runners.values()):
            runner.end()

    def _is_leaving(self, runner: Runner) -> bool:
        """Whether it has expired without users: it can't be used any more, only loaded again once it is gone."""
        over = runner.ready and not runner.users and runner.expires_ns <= time.time_ns()
        return over and not self._settings.fault("never_unload")

    def _max_loaded(self) -> int:
        return int(self._settings.fault("max_loaded") or os.environ.get("OLLAMA_MAX_LOADED_MODELS") or 0) or 3

    def _evict_one(self) -> None:
        """End the idle model with the shortest keep-alive time; if all are busy, wait for one."""
        idle = [runner for runner in self._runners.values() if runner.ready and not runner.users]
        if idle:
            self._free(min(idle, key=lambda runner: runner.keep_alive))
        else:
            self._changed.wait(LOOK)

    def _start(self, model: Installed, key: str, asked: tuple[object, ...], context: int, keep: int | None) -> Runner:
        options = model.options
        trained = options.context_length
        if context > trained:
            log(
                "WARN",
                "server.go:169",
                "requested context size too large for model",
                num_ctx=context,
                n_ctx_train=trained,
            )
        weights = self._library.blobs / key
        port = _free_port()
        seconds = self._settings.fault("slow_load") or options.load_seconds
        if self._settings.fault("stuck_load") or self._settings.fault("crash_at_load"):
            seconds = "never"
        log("INFO", "server.go:433", "starting runner", cmd=f"ollama runner --model {weights} --port {port}")
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(SCRIPT), "runner", "--model", str(weights), "--port", str(port)],
            env=os.environ | {"FAKE_OLLAMA_HOLD_MB": str(options.hold_mb), "FAKE_OLLAMA_LOAD_SECONDS": str(seconds)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        default = parse_duration(os.environ.get("OLLAMA_KEEP_ALIVE") or "5m")
        kept = default if keep is None else keep
        kept = FOR_EVER if kept < 0 else kept
        runner = Runner(model, key, asked, min(context, trained), process, kept)
        self._runners[key] = runner
        log("INFO", "server.go:1385", "waiting for llama runner to start responding")
        log("INFO", "server.go:1428", "waiting for server to become available", status="llm server loading model")
        return runner

    def _load(self, runner: Runner, gone: Callable[[], bool]) -> None:
        """Follow the runner's output until it is ready."""
        stdout = runner.process.stdout
        assert stdout is not None
        debug = os.environ.get("OLLAMA_DEBUG", "") not in {"", "0", "false"}
        begun = time.monotonic()
        said = b""
        while b"ready\n" not in said:
            if gone():
                log("WARN", "server.go:1395", "client connection closed before server finished loading, aborting load")
                raise ClientGone
            readable, _, _ = select.select([stdout], [], [], LOOK)
            if not readable:
                continue
            piece = os.read(stdout.fileno(), 4096)
            if not piece:
                code = runner.process.wait()
                raise self._failed(runner, "signal: killed" if code == -signal.SIGKILL else f"exit status {code}")
            for word in piece.decode().split():
                if debug and word != "ready":
                    log("DEBUG", "server.go:1438", f"model load progress {word}")
            said += piece
            if self._settings.fault("crash_at_load"):
                os.kill(os.getpid(), signal.SIGKILL)
        if runner.model.options.broken:
            raise self._failed(runner, f"{MISSING_TENSOR}{self._library.blobs / runner.key}")
        took = time.monotonic() - begun
        with self._changed:
            runner.ready = True
            runner.expires_ns = time.time_ns() + runner.keep_alive
            self._changed.notify_all()
        log("INFO", "server.go:1432", f"llama runner started in {took:.2f} seconds")
        log("INFO", "sched.go:561", "loaded runners", count=len(self._runners))

    def _failed(self, runner: Runner, why: str) -> LoadFailed:
        text = f"llama runner process has terminated: {why}"
        log("INFO", "sched.go:467", "Load failed", model=self._library.blobs / runner.key, error=text)
        return LoadFailed(text)

    def _free(self, runner: Runner) -> None:
        """Remove it from the list, then end its process. Call with the lock held."""
        if self._runners.get(runner.key) is runner:
            del self._runners[runner.key]
        runner.end()
        self._changed.notify_all()

    def _expire(self) -> None:
        while True:
            with self._changed:
                waits = [self._seconds_left(runner) for runner in self._runners.values()]
                for runner in [runner for runner in self._runners.values() if self._seconds_left(runner) <= 0]:
                    self._free(runner)
                self._changed.wait(max(0.001, min([*waits, 0.25])) if waits else None)

    def _seconds_left(self, runner: Runner) -> float:
        held = self._settings.fault("never_unload") and runner.process.poll() is None  # as if a request hung in it
        if not runner.ready or runner.users or held:
            return 1.0
        evict_after = self._settings.fault("evict_after")
        if evict_after is not None and time.monotonic() - runner.idle_since >= float(evict_after):
            return 0.0
        freed_after = float(self._settings.fault("unload_after") or FREED_AFTER)
        return (runner.expires_ns - time.time_ns()) / SECOND + freed_after


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
