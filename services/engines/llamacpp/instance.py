"""One llama.cpp server process with its model, from the load request to the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil

from services.engines.llamacpp.launch import OnEnd, ServerHandle
from services.engines.port import (
    HOST_DEVICE,
    Endpoint,
    Evidence,
    Exit,
    GpuBytes,
    LoadFailed,
    Model,
    NoSleepMixin,
    OnExit,
    Report,
    Usage,
)
from services.engines.processes import GroupLeader
from services.http import FetchError, TooSlow, fetch
from services.sizes import format_part, format_speed

POLL_SECONDS = 0.01
"""Interval at which a load is polled; readiness has to be noticed within 50 ms."""
SLOW_AFTER_SECONDS = 10.0
SLOW_REMAINING_SECONDS = 30.0
PROBE_TIMEOUT = 5.0


class LlamaCppInstance(NoSleepMixin):
    """One llama.cpp server process with its model.

    `start` starts or finds the process; `on_warm` is called after its first token. `ready` is the endpoint of a process
    that was found.
    """

    def __init__(
        self,
        model: Model,
        key: str,
        device: str,
        start: Callable[[OnEnd], ServerHandle],
        on_exit: OnExit,
        gpu_bytes: GpuBytes,
        on_warm: Callable[[GroupLeader, Endpoint], None] = lambda _process, _endpoint: None,
        ready: Endpoint | None = None,
    ) -> None:
        self.model = model
        self._device = device
        self._gpu_bytes = gpu_bytes
        self._on_warm = on_warm
        self._on_exit = on_exit
        self._stopping = threading.Event()
        self._endpoint = ready
        self._key = key
        self._launched_at = time.monotonic()
        self._server = start(self._ended)

    @property
    def pid(self) -> int:
        return self._server.process.pid

    def wait_ready(self, report: Report, timeout: float) -> Endpoint:
        deadline = self._launched_at + timeout
        seen: Evidence | None = None
        while self._endpoint is None and not self._is_ready():
            self._fail_if_gone()
            if time.monotonic() > deadline:
                raise LoadFailed(f"It was not ready after {timeout:.0f} s.", self.log_tail())
            evidence = self._evidence()
            if evidence != seen:
                report(evidence)
                seen = evidence
            self._server.wait(POLL_SECONDS)
        assert self._endpoint is not None
        return self._endpoint

    def warm_up(self, timeout: float) -> None:
        assert self._endpoint is not None, "wait_ready comes first"
        question = {"prompt": "Hello", "max_tokens": 1, "cache_prompt": False}
        url = f"{self._endpoint.origin}/v1/completions"
        try:
            answer = fetch("POST", url, body=question, headers=self._endpoint.headers, timeout=timeout)
        except FetchError as error:
            self._fail_if_gone()
            raise LoadFailed(f"It did not answer its first request: {error}.", self.log_tail()) from None
        if answer.status != 200:
            raise LoadFailed(f"Its first answer was an error: {answer.text[:300]}", self.log_tail())
        self._on_warm(self._server.process, self._endpoint)

    def responds(self, timeout: float) -> bool | None:
        """Request `/slots`: the generating thread answers it between two batches. `/health` is another thread's."""
        assert self._endpoint is not None, "wait_ready comes first"
        try:
            answer = fetch("GET", f"{self._endpoint.origin}/slots", headers=self._endpoint.headers, timeout=timeout)
        except TooSlow:
            return False
        except FetchError:
            return None  # a connection error: the process watcher reports an exit
        return True if answer.status == 200 else None  # 501: the endpoint is disabled

    def usage(self) -> Usage | None:
        if self._device != HOST_DEVICE:
            held = self._gpu_bytes(self._device, self.pid)
            return None if held is None else Usage(self._device, held)
        try:
            memory = psutil.Process(self.pid).memory_info()
        except psutil.Error:
            return None
        return Usage(HOST_DEVICE, memory.rss, mapped_bytes=min(memory.shared, memory.rss))

    def stop(self, grace: float) -> None:
        self._stopping.set()
        self._server.process.stop(grace)

    def log_tail(self) -> str:
        return self._server.process.log_tail()

    def warning(self) -> str | None:
        return None

    def _ended(self, _code: int | None) -> None:
        if not self._stopping.is_set():
            self._on_exit(Exit(f"Its process {self._server.process.describe_end()}"))

    def _fail_if_gone(self) -> None:
        process = self._server.process
        if self._stopping.is_set():
            raise LoadFailed("It was stopped while loading.", self.log_tail())
        if process.exited:
            tail = self.log_tail()
            ended = f"Its process {process.describe_end()}"
            raise LoadFailed(ended if process.killed else first_cause(tail) or f"{ended} while loading", tail)

    def _is_ready(self) -> bool:
        """Return whether it serves the model: the embedded server says so itself, a native one has to be asked."""
        origin = self._server.origin()
        endpoint = endpoint_of(origin, self._key) if origin is not None else None
        if endpoint is not None and (self._server.announced or is_ready(endpoint, PROBE_TIMEOUT)):
            self._endpoint = endpoint
        return self._endpoint is not None

    def _evidence(self) -> Evidence:
        total, read = self.model.size_bytes, self._server.bytes_read()
        if not total or read is None:
            return Evidence("loading_weights")
        if read >= total:
            return Evidence("initializing_gpu")
        return Evidence("loading_weights", read / total, self._describe_progress(read, total))

    def _describe_progress(self, read: int, total: int) -> str:
        words = f"{format_part(read, total)} read"
        elapsed = time.monotonic() - self._launched_at
        if elapsed > SLOW_AFTER_SECONDS:
            words += f" at {format_speed(read / elapsed)}"
            if (total - read) * elapsed > read * SLOW_REMAINING_SECONDS:
                words += ", this may take a while"
        return words


def endpoint_of(origin: str, key: str) -> Endpoint:
    """Return the endpoint of a server that requires `key`."""
    return Endpoint(origin, {"Authorization": f"Bearer {key}"})


def is_ready(endpoint: Endpoint, timeout: float) -> bool:
    """Return whether a server is healthy *and* lists a model; its port may be open before both.

    Each request takes at most `timeout` seconds.
    """
    try:
        if fetch("GET", f"{endpoint.origin}/health", headers=endpoint.headers, timeout=timeout).status != 200:
            return False
        listed = fetch("GET", f"{endpoint.origin}/v1/models", headers=endpoint.headers, timeout=timeout)
        return listed.status == 200 and bool(listed.document().get("data"))
    except (FetchError, ValueError):
        return False


def first_cause(log_tail: str) -> str | None:
    """Return the most telling line of llama.cpp's log as a cause; None if there is none.

    Logs of llama.cpp b6000 and later have lines such as `0.00.003.604 E llama_model_load: error loading model: …`.
    """
    for line in log_tail.splitlines():
        for mark in ("error loading model:", "llama_init_from_model:", "failed to allocate", "error:"):
            if mark in line:
                telling = line[line.index(mark) :] if mark.startswith("failed") else line.split(mark, 1)[1]
                return f"llama.cpp could not load it: {telling.strip()}"
    return None
