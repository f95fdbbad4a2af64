"""Fetches a vLLM model's weights into the Hugging Face cache before its container starts.

vLLM would download them itself, but without reporting progress. It still loads by itself sources that are paths, and
models whose arguments or environment make it load from another place, or other files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from services.cancellation import CancelToken
from services.downloads.disk import DiskCheck
from services.downloads.fetcher import DownloadError, Phase
from services.downloads.huggingface.cache import CachedModel
from services.downloads.huggingface.names import HubName, parse
from services.downloads.huggingface.process import HubProcess
from services.downloads.progress import Figures
from services.downloads.transfer import TransferObserver
from services.engines.port import Evidence, LoadFailed, Model, Report
from services.native_threads import NativeThreadPool, SharedCall
from services.sizes import format_part

log = structlog.get_logger(__name__)

OTHER_ARGUMENTS = ("--download-dir", "--load-format", "--revision")
OTHER_ENVIRONMENT = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "VLLM_USE_MODELSCOPE")
"""Each of these makes vLLM look in another place, or for other files."""
PASSED_ON = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")
TRUE = ("1", "ON", "YES", "TRUE")
"""Values that huggingface_hub takes as true."""
MAX_NAMED = 3
"""Limit of missing files named in a message."""
SCAN_SECONDS = 2.0
"""Time limit of a scan of a model's files in the cache."""
FETCH_SCAN_SECONDS = 10.0
"""The same before a fetch, which depends on its result."""
FATAL = ("disk_full", "digest_mismatch")
"""Errors that vLLM's own download would meet too: then the load fails instead of using an older version."""


class VllmWeights:
    """Weights in `hub_cache`, mounted as ~/.cache/huggingface in containers; `margin_bytes` of its disk stay free."""

    def __init__(self, hub_cache: Path, process: HubProcess, *, margin_bytes: int = 0) -> None:
        self._cache = hub_cache.absolute() / "hub"
        self._process = process
        self._disk = DiskCheck({"huggingface": lambda: self._cache}, margin_bytes=margin_bytes)
        self._threads = NativeThreadPool(1, FETCH_SCAN_SECONDS)
        self._scans: dict[HubName, SharedCall[tuple[int, ...]]] = {}
        self._shards: dict[HubName, tuple[int, ...]] = {}

    def size_bytes(self, model: Model) -> int | None:
        """Return the size of a model's weights in the cache, None if incomplete. Never raises.

        While the cache's disk (a network share) hangs, it is the size last seen.
        """
        try:
            name = _name_of(model, {})
        except LoadFailed:
            return None
        if name is None:
            return None
        scan = self._scans.setdefault(name, SharedCall(CachedModel(self._cache, name).shard_bytes))
        with suppress(TimeoutError):
            self._shards[name] = scan(SCAN_SECONDS)
        return sum(self._shards.get(name, ())) or None

    def shard_bytes(self, model: Model) -> tuple[int, ...]:
        """Return the sizes of the weights' files in vLLM's loading order, as `size_bytes` last saw them.

        Empty if unknown. No I/O, never raises.
        """
        try:
            name = _name_of(model, {})
        except LoadFailed:
            return ()
        return self._shards.get(name, ()) if name is not None else ()

    def fetches(self, model: Model) -> bool:
        """Return whether this model's weights are fetched here. No I/O, never raises."""
        try:
            return _name_of(model, {}) is not None
        except LoadFailed:
            return False

    def fetch(self, model: Model, environment: Mapping[str, str], report: Report, token: CancelToken) -> None:
        """Block until everything that vLLM loads of a model is in the cache.

        `environment` is the container's. Existing files are not requested again; if none is missing, an unreachable
        Hugging Face is no error. Raises LoadFailed, and Cancelled within a second of the cancellation.
        """
        name = _name_of(model, environment)
        if name is None:
            return
        try:
            missing_files = self._threads(CachedModel(self._cache, name).missing_files)
        except TimeoutError:
            raise LoadFailed(f"The Hugging Face cache {self._cache} does not answer. Check its disk.") from None
        if environment.get("HF_HUB_OFFLINE", "").upper() in TRUE:
            if missing_files:
                raise LoadFailed(self._offline_message(name, missing_files))
            return
        if missing_files:
            report(Evidence("downloading", None, "asking what there is to download"))
        progress = _Progress(report)
        observer = TransferObserver(self._disk, "huggingface", time.monotonic, progress.report)
        try:
            self._process.fetch(
                "cache",
                self._cache,
                str(name),
                observer.observe,
                token,
                max_list_tries=None if missing_files else 1,
                environment={key: environment[key] for key in PASSED_ON if key in environment},
            )
        except DownloadError as error:
            if missing_files or error.code in FATAL:
                raise LoadFailed(error.message) from None
            log.warning("loading the cached version of a model", model=model.id, reason=error.message)

    def _offline_message(self, name: HubName, missing_files: tuple[str, ...]) -> str:
        more = f" and {len(missing_files) - MAX_NAMED} more" if len(missing_files) > MAX_NAMED else ""
        return (
            f"HF_HUB_OFFLINE is set, and the Hugging Face cache {self._cache} lacks of {name}: "
            f"{', '.join(missing_files[:MAX_NAMED])}{more}. Unset it to download them, or copy them there."
        )


class _Progress:
    """Reports the download as evidence of the load. Silent while nothing has to be fetched; never goes back."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._fraction = 0.0
        self._downloads = False

    def report(self, figures: Figures) -> None:
        done, total = figures.completed_bytes, figures.total_bytes
        if not total:
            return
        self._downloads = self._downloads or done < total
        if self._downloads:
            self._fraction = max(self._fraction, done / total)
            self._report(Evidence("downloading", self._fraction, _words(figures.phase, done, total)))


def _words(phase: Phase, done: int, total: int) -> str:
    checking = ", checking them" if phase == "verifying" else ""
    return f"{format_part(done, total)} of the weights{checking}"


def _name_of(model: Model, environment: Mapping[str, str]) -> HubName | None:
    """Return what to fetch from Hugging Face, None for what vLLM loads itself. Raises LoadFailed for a bad revision."""
    arguments = model.options.get("arguments")
    given = [str(a).partition("=")[0] for a in arguments] if isinstance(arguments, (list, tuple)) else []
    if {name.replace("_", "-") for name in given} & {*OTHER_ARGUMENTS} or {*OTHER_ENVIRONMENT} & environment.keys():
        return None
    try:
        name = parse(model.source)
    except DownloadError:
        return None
    if name != HubName(name.owner, name.repo):  # one file, or one quantisation
        return None
    revision = model.options.get("revision")
    if not revision:
        return name
    try:
        return parse(f"{name.repo_id}@{revision}")
    except DownloadError as error:
        raise LoadFailed(f"The option revision is wrong. {error.message}") from None
