"""Fetches Ollama models. Ollama transfers the bytes; its progress is observed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from urllib.parse import urlsplit

import structlog

from services.cancellation import CancelToken
from services.downloads.fetcher import DownloadError, FileProgress, Phase, Report, Source, TransferUpdate
from services.downloads.ollama.command import pull_by_command
from services.downloads.ollama.output import (
    DrawnLayer,
    PullEvent,
    PullFailed,
    PullLayer,
    PullStatus,
    PullSucceeded,
    explain,
    short_digest,
)
from services.downloads.ollama.registry import Manifest, Registries, fetch_manifest
from services.downloads.ollama.rounding import Unrounding
from services.downloads.ollama.stream import pull_by_stream
from services.engines.ollama.names import OllamaName, library_name
from services.engines.processes import ProcessRegistry
from services.http import is_loopback

log = structlog.get_logger(__name__)

MANIFEST_SECONDS = 5.0
CHECKED_PER_SECOND = 50e6
"""Bytes per second that Ollama verifies even on a slow disk, while it reports nothing."""
PHASES: tuple[Phase, ...] = ("resolving", "downloading", "verifying", "writing")


class OllamaFetcher:
    """Has Ollama pull models: by its command if that is installed here, else through its HTTP API.

    `find_binary` returns the path of `ollama` or None, at each download. Only models of `registries` are pulled;
    registries are asked for sizes only. A download without news for `stall_seconds` fails.
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
        """Return the name as `/api/tags` lists it. Raises DownloadError `invalid_name`, `registry_not_allowed`."""
        return self._parse(name).full

    def fetch(self, name: str, report: Report, token: CancelToken) -> None:
        """Block until Ollama has the model; see `Fetcher.fetch`."""
        model = self._parse(name)
        token.check()
        report(TransferUpdate("resolving"))
        pull = _PullProgress(model, self._manifest(model, token), report, self._stall_seconds)
        with closing(self._events(model, pull, token)) as said:
            for events in said:
                pull.update(events)
        if pull.complete:
            return
        raise DownloadError(
            "interrupted",
            f"Ollama ended in the middle of downloading {model.short}. See that it runs, then resume: what has arrived"
            " is kept, except pieces that were not complete.",
            may_resume=True,
        )

    def discard(self, name: str) -> None:
        """Do nothing: Ollama has no request for it, and deletes partial files itself (at a start an hour later)."""

    def _parse(self, name: str) -> OllamaName:
        """Parse a name. Only registries allowed by the settings pass, because Ollama contacts any host in a name.

        Another registry than Ollama's own may have what Ollama's library lacks.
        """
        try:
            model = OllamaName.parse(library_name(name) if self._registries.is_ollamas else name)
        except ValueError as error:
            raise DownloadError("invalid_name", str(error)) from None
        self._registries.origin(model)
        return model

    def _events(
        self, model: OllamaName, pull: _PullProgress, token: CancelToken
    ) -> Generator[list[PullEvent], None, None]:
        binary = self._find_binary() if is_loopback(urlsplit(self._base_url).hostname or "") else None
        if binary is not None:
            try:
                yield from pull_by_command(
                    binary,
                    model,
                    self._base_url,
                    insecure=self._registries.insecure,
                    token=token,
                    registry=self._processes,
                )
                return
            except OSError as error:
                log.warning("ollama can't be started; pulling through its API", program=binary, error=str(error))
        yield from pull_by_stream(
            model, self._base_url, insecure=self._registries.insecure, token=token, timeout=pull.seconds_left
        )

    def _manifest(self, model: OllamaName, token: CancelToken) -> Manifest | None:
        """Return the registry's manifest; None on an error: then sizes become known layer by layer."""
        try:
            return fetch_manifest(model, self._registries, timeout=MANIFEST_SECONDS, token=token)
        except DownloadError as error:
            log.info("a model's sizes are unknown", model=model.full, reason=error.message)
            return None


class _PullProgress:
    """Adds up the events of one pull, reports them, and detects a stall."""

    def __init__(self, model: OllamaName, manifest: Manifest | None, report: Report, stall_seconds: float) -> None:
        self.complete = False
        self._model = model
        self._report = report
        self._stall_seconds = stall_seconds
        self._expected = manifest.size_bytes if manifest else None
        sizes = {short_digest(digest): size for digest, size in manifest.layers.items()} if manifest else {}
        self._unrounding = Unrounding(sizes)
        self._phase: Phase = "resolving"
        self._parts: dict[str, FileProgress] = {}
        self._news_at = time.monotonic()

    def update(self, events: list[PullEvent]) -> None:
        """Take in events. Raises DownloadError if Ollama failed, or nothing new has come for too long."""
        now = time.monotonic()
        parts: dict[str, FileProgress] = {}
        for event in events:
            match event:
                case PullLayer(digest, completed, total):
                    parts[digest] = FileProgress(completed, total)
                    self._reach("downloading", now)
                case DrawnLayer(digest):
                    parts[digest] = self._unrounding.part(event, now)
                    self._reach("downloading", now)
                    if event.bytes_per_second:
                        self._news_at = now  # the rounded figures of a large layer change rarely
                case PullStatus(phase):
                    self._reach(phase, now)
                case PullFailed(text):
                    raise explain(text, self._model.short)
                case PullSucceeded():
                    self.complete = True
        if any(self._parts.get(digest) != part for digest, part in parts.items()):
            self._news_at = now
        self._parts.update(parts)
        self._report(TransferUpdate(self._phase, parts, self._expected))
        if not self.complete and self.seconds_left() <= 0:
            raise self._stalled()

    def seconds_left(self) -> float:
        """Return the seconds until the pull counts as stalled, at least 0."""
        patience = self._stall_seconds
        if self._phase in ("verifying", "writing"):
            patience += sum(part.total for part in self._parts.values()) / CHECKED_PER_SECOND
        return max(0.0, self._news_at + patience - time.monotonic())

    def _reach(self, phase: Phase, now: float) -> None:
        """Advance to a phase. Every frame repeats the earlier phases, which are ignored."""
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
