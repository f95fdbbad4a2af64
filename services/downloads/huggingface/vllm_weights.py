"""The weights of a model from the hub, brought into the Hugging Face cache before its container looks for them.

vLLM downloads by itself, but without a word about how far it is. What is left to it: sources that are paths, and
models whose arguments or environment have it load from somewhere else, or something else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from services.abort import Abort
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
"""With one of these, vLLM looks for its files in another place, or for others."""
PASSED_ON = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")
TRUE = ("1", "ON", "YES", "TRUE")
"""What huggingface_hub takes for a yes."""
NAMED = 3
"""How many of the missing files are named."""
LOOK_SECONDS = 2.0
"""How long a look at a model's files in the cache is waited for."""
FETCH_LOOK_SECONDS = 10.0
"""The same before they are fetched, when something depends on it."""
FATAL = ("disk_full", "digest_mismatch")
"""What would be no better if vLLM tried: a load doesn't go on with an older version then."""


class VllmWeights:
    """`hub_cache` is what containers have as their ~/.cache/huggingface; `margin_bytes` of its disk stay free."""

    def __init__(self, hub_cache: Path, process: HubProcess, *, margin_bytes: int = 0) -> None:
        self._cache = hub_cache.absolute() / "hub"
        self._process = process
        self._disk = DiskCheck({"huggingface": lambda: self._cache}, margin_bytes=margin_bytes)
        self._threads = NativeThreadPool(1, FETCH_LOOK_SECONDS)
        self._looks: dict[HubName, SharedCall[tuple[int, ...]]] = {}
        self._shards: dict[HubName, tuple[int, ...]] = {}

    def size_bytes(self, model: Model) -> int | None:
        """How large its weights are, as they lie in the cache; None when they don't. Never raises.

        As they were last seen, while the cache's disk (a network share) hangs.
        """
        try:
            name = _name_of(model, {})
        except LoadFailed:
            return None
        if name is None:
            return None
        look = self._looks.setdefault(name, SharedCall(CachedModel(self._cache, name).shard_bytes))
        with suppress(TimeoutError):
            self._shards[name] = look(LOOK_SECONDS)
        return sum(self._shards.get(name, ())) or None

    def shard_bytes(self, model: Model) -> tuple[int, ...]:
        """The sizes of its weights' files in the order in which vLLM loads them, as `size_bytes` last saw them.

        Empty where it did not. No I/O, never raises.
        """
        try:
            name = _name_of(model, {})
        except LoadFailed:
            return ()
        return self._shards.get(name, ()) if name is not None else ()

    def fetches(self, model: Model) -> bool:
        """Whether its weights come from the hub through here. No I/O, never raises."""
        try:
            return _name_of(model, {}) is not None
        except LoadFailed:
            return False

    def fetch(self, model: Model, environment: Mapping[str, str], report: Report, abort: Abort) -> None:
        """Block until all that vLLM loads of a model is in the cache.

        `environment` is its container's. Files that are there are not asked for again, and where all are, a hub that
        can't be asked is no reason to fail. Raises LoadFailed, and Aborted within a second of `abort`.
        """
        name = _name_of(model, environment)
        if name is None:
            return
        try:
            lacking = self._threads(CachedModel(self._cache, name).lacking)
        except TimeoutError:
            raise LoadFailed(f"The Hugging Face cache {self._cache} does not answer. Check its disk.") from None
        if environment.get("HF_HUB_OFFLINE", "").upper() in TRUE:
            if lacking:
                raise LoadFailed(self._say_offline(name, lacking))
            return
        if lacking:
            report(Evidence("downloading", None, "asking what there is to download"))
        progress = _Progress(report)
        observer = TransferObserver(self._disk, "huggingface", time.monotonic, progress.tell)
        try:
            self._process.fetch(
                "cache",
                self._cache,
                str(name),
                observer.see,
                abort,
                asks=None if lacking else 1,
                environment={key: environment[key] for key in PASSED_ON if key in environment},
            )
        except DownloadError as error:
            if lacking or error.code in FATAL:
                raise LoadFailed(error.message) from None
            log.warning("a model is loaded as the cache has it", model=model.id, reason=error.message)

    def _say_offline(self, name: HubName, lacking: tuple[str, ...]) -> str:
        more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        return (
            f"HF_HUB_OFFLINE is set, and the Hugging Face cache {self._cache} lacks of {name}: "
            f"{', '.join(lacking[:NAMED])}{more}. Unset it to download them, or copy them there."
        )


class _Progress:
    """Tells a load how far its download is. Silent as long as nothing has to come, and never goes back."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._fraction = 0.0
        self._downloads = False

    def tell(self, figures: Figures) -> None:
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
    """What to bring from the hub; None for what is left to vLLM. Raises LoadFailed for an impossible revision."""
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
