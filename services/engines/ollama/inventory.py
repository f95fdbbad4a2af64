"""What an Ollama server has on its disk, as last listed and shown, and which of its names mean the same in memory.

Ollama keeps one runner for a file of weights and a set of runner options, and lists it in `/api/ps` under the name that
it was loaded by. Every other name of the same (`ollama cp`, a Modelfile with a SYSTEM of its own) is served by it too.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping

from services.engines.ollama.api import Installed, OllamaApi, OllamaError, OllamaUnreachable, Shown

LIST_SECONDS = 1.0
FIRST_LIST_SECONDS = 0.5
LIST_TIMEOUT = 3.0
SHOW_AGAIN_SECONDS = 10.0
OURS = "switchyard/"
"""Names that begin so are made here: the same weights with a context of their own, see `derived_name`."""
VERSION_LENGTH = 12
_DERIVED = re.compile(rf"{OURS}.+:ctx(?P<context>[0-9]+)-(?P<version>[0-9a-f]{{{VERSION_LENGTH}}})")


def derived_name(installed: Installed, context_length: int) -> str:
    """The name for a model with a context of its own built in: `/v1` takes none."""
    return f"{OURS}{_stem(installed.name)}:ctx{context_length}-{installed.digest[:VERSION_LENGTH]}"


class Inventory:
    """Asked from any thread. `list` and `show` ask the server; everything else is answered from memory."""

    def __init__(self, api: OllamaApi) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._installed: dict[str, Installed] | None = None
        self._listed_at = float("-inf")
        self._shown: dict[str, Shown] = {}
        self._show_after = float("-inf")
        self.serving = False
        """Whether the app runs: before, nobody may be kept waiting by a server that doesn't answer."""

    @property
    def known(self) -> bool:
        """Whether the server has ever said what it has."""
        return self._installed is not None

    @property
    def latest(self) -> Mapping[str, Installed]:
        """What is installed by name, as last listed."""
        return self._installed or {}

    def list(self, *, fresh: bool = False) -> Mapping[str, Installed]:
        """What is installed, at most a second old; what was last known when the server doesn't answer."""
        with self._lock:
            if not fresh and time.monotonic() - self._listed_at < LIST_SECONDS:
                return self.latest
            self._listed_at = time.monotonic()
        try:
            listed = self._api.installed(LIST_TIMEOUT if self.serving else FIRST_LIST_SECONDS)
        except (OllamaError, OllamaUnreachable):
            return self.latest
        with self._lock:
            self._installed = {entry.name: entry for entry in listed}
            return self._installed

    def show(self, name: str, digest: str) -> None:
        """Learn more of a model than the list tells, once for each version of it."""
        if digest in self._shown or time.monotonic() < self._show_after:
            return
        try:
            self._shown[digest] = self._api.show(name)
        except OllamaUnreachable:
            self._show_after = time.monotonic() + SHOW_AGAIN_SECONDS  # forty models must not wait forty times
        except OllamaError:
            self._shown[digest] = Shown()

    def shown(self, digest: str | None) -> Shown | None:
        """What was learned of a version; None as long as nothing was."""
        return self._shown.get(digest or "")

    def any_blob(self) -> str | None:
        """Some file of the models folder, as the server sees it."""
        return next((shown.blob for shown in [*self._shown.values()] if shown.blob), None)

    def source_of(self, name: str) -> str:
        """The model behind a name: itself, or what a name of ours was made from."""
        if not name.startswith(OURS):
            return name
        stem = name.removeprefix(OURS).rpartition(":")[0]
        return next((n for n in self.latest if not n.startswith(OURS) and _stem(n) == stem), name)

    def names_of(self, source: str) -> tuple[str, ...]:
        """A model's own name, and those that were made from it here."""
        return (source, *(n for n in self.latest if n.startswith(OURS) and self.source_of(n) == source))

    def held_as(self, name: str, digest: str | None = None) -> str | None:
        """What lies in memory when this name is loaded; None when that was never shown.

        `digest` says which version of it; None: the installed one.
        """
        derived = _DERIVED.fullmatch(name)
        if derived is not None:
            base = next(
                (shown for known, shown in [*self._shown.items()] if known.startswith(derived["version"])), None
            )
            return base.held_as({"num_ctx": int(derived["context"])}) if base is not None else None
        installed = self.latest.get(name)
        shown = self.shown(digest or (installed.digest if installed is not None else None))
        return shown.held_as() if shown is not None else None


def _stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
