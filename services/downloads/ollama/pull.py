"""Downloads of Ollama's models. Ollama moves the bytes itself: it is told to, and watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from urllib.parse import urlsplit

import structlog

from services.abort import Abort
from services.downloads.fetcher import DownloadError, Part, Phase, Report, Seen, Source
from services.downloads.ollama.command import pull_by_command
from services.downloads.ollama.output import (
    DrawnLayer,
    Failed,
    Layer,
    PullEvent,
    PullStatus,
    Succeeded,
    explain,
    short_digest,
)
from services.downloads.ollama.registry import Manifest, Registries, fetch_manifest
from services.downloads.ollama.rounding import Unrounding
from services.downloads.ollama.stream import pull_by_stream
from services.engines.ollama.names import OllamaName
from services.engines.processes import ProcessRegistry
from services.http import is_loopback

log = structlog.get_logger(__name__)

MANIFEST_SECONDS = 5.0
CHECKED_PER_SECOND = 50e6
"""Bytes that even a slow disk lets Ollama check in a second; it says nothing meanwhile."""
PHASES: tuple[Phase, ...] = ("resolving", "downloading", "verifying", "writing")


class OllamaFetcher:
    """Has Ollama pull models: through its command where that is here as well, else through its HTTP API.

    `find_binary` gives the path of the `ollama` program or None; it is asked for each download. Only models of
    `registries` are pulled, which are asked for sizes ahead of time, no more: Ollama moves the bytes. After
    `stall_seconds` without anything new a download is given up.
    """

    def __init__(
        self,
        base_url: str,
        *,
        find_binary: Callable[[], str | None],
        registries: Registries,
        stall_seconds: float = 300.0,
        registry: ProcessRegistry | None = None,
    ) -> None:
        self._base_url = base_url
        self._find_binary = find_binary
        self._registries = registries
        self._stall_seconds = stall_seconds
        self._processes = registry

    @property
    def source(self) -> Source:
        return "ollama"

    def check_name(self, name: str) -> str:
        """As `/api/tags` will list it. Raises DownloadError `invalid_name`, `registry_not_allowed`."""
        return self._parse(name).full

    def fetch(self, name: str, report: Report, abort: Abort) -> None:
        """Block until Ollama has the model; see the port."""
        model = self._parse(name)
        abort.check()
        report(Seen("resolving"))
        pull = _Pull(model, self._manifest(model, abort), report, self._stall_seconds)
        with closing(self._events(model, pull, abort)) as said:
            for events in said:
                pull.take(events)
        if pull.complete:
            return
        raise DownloadError(
            "interrupted",
            f"Ollama ended in the middle of downloading {model.short}. See that it runs, then resume: what has arrived"
            " is kept, except pieces that were not complete.",
            may_resume=True,
        )

    def discard(self, name: str) -> None:
        """Nothing: Ollama offers no way to ask for it, and prunes partial files itself (at a start an hour later)."""

    def _parse(self, name: str) -> OllamaName:
        """Ollama asks whatever host a name begins with, so only registries that the settings allow get to it."""
        try:
            model = OllamaName.parse(name)
        except ValueError as error:
            raise DownloadError("invalid_name", str(error)) from None
        self._registries.origin(model)
        return model

    def _events(self, model: OllamaName, pull: _Pull, abort: Abort) -> Generator[list[PullEvent], None, None]:
        binary = self._find_binary() if is_loopback(urlsplit(self._base_url).hostname or "") else None
        if binary is not None:
            try:
                yield from pull_by_command(
                    binary,
                    model,
                    self._base_url,
                    insecure=self._registries.insecure,
                    abort=abort,
                    registry=self._processes,
                )
                return
            except OSError as error:
                log.warning("the ollama program can't be started, its API is used", program=binary, error=str(error))
        yield from pull_by_stream(
            model, self._base_url, insecure=self._registries.insecure, abort=abort, patience=pull.seconds_left
        )

    def _manifest(self, model: OllamaName, abort: Abort) -> Manifest | None:
        """What the registry says ahead, or None: without it the sizes come as Ollama gets to them."""
        try:
            return fetch_manifest(model, self._registries, timeout=MANIFEST_SECONDS, abort=abort)
        except DownloadError as error:
            log.info("sizes are unknown ahead", model=model.full, reason=error.message)
            return None


class _Pull:
    """One pull: adds up what Ollama says, tells it on, and loses patience when nothing new comes."""

    def __init__(self, model: OllamaName, manifest: Manifest | None, report: Report, stall_seconds: float) -> None:
        self.complete = False
        self._model = model
        self._report = report
        self._stall_seconds = stall_seconds
        self._expected = manifest.size_bytes if manifest else None
        sizes = {short_digest(digest): size for digest, size in manifest.layers.items()} if manifest else {}
        self._unrounding = Unrounding(sizes)
        self._phase: Phase = "resolving"
        self._parts: dict[str, Part] = {}
        self._news_at = time.monotonic()

    def take(self, events: list[PullEvent]) -> None:
        """Raises DownloadError when Ollama gave up, or has said nothing new for too long."""
        now = time.monotonic()
        parts: dict[str, Part] = {}
        for event in events:
            match event:
                case Layer(digest, completed, total):
                    parts[digest] = Part(completed, total)
                    self._reach("downloading", now)
                case DrawnLayer(digest):
                    parts[digest] = self._unrounding.part(event, now)
                    self._reach("downloading", now)
                    if event.bytes_per_second:
                        self._news_at = now  # of a large layer the figures show a change only now and then
                case PullStatus(phase):
                    self._reach(phase, now)
                case Failed(text):
                    raise explain(text, self._model.short)
                case Succeeded():
                    self.complete = True
        if any(self._parts.get(digest) != part for digest, part in parts.items()):
            self._news_at = now
        self._parts.update(parts)
        self._report(Seen(self._phase, parts, self._expected))
        if not self.complete and self.seconds_left() <= 0:
            raise self._stalled()

    def seconds_left(self) -> float:
        """How long it may go on without anything new; never below 0."""
        patience = self._stall_seconds
        if self._phase in ("verifying", "writing"):
            patience += sum(part.total for part in self._parts.values()) / CHECKED_PER_SECOND
        return max(0.0, self._news_at + patience - time.monotonic())

    def _reach(self, phase: Phase, now: float) -> None:
        """Every frame draws the earlier phases again; it never goes back to one."""
        if PHASES.index(phase) > PHASES.index(self._phase):
            self._phase = phase
            self._news_at = now

    def _stalled(self) -> DownloadError:
        return DownloadError(
            "stalled",
            f"Nothing new has come of {self._model.short} for {self._stall_seconds:.0f} s, so its download was stopped."
            " Check the network and Ollama, then resume: what has arrived is kept.",
            may_resume=True,
        )
