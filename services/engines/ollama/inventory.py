"""The models on an Ollama server's disk, as last listed, and which of their names are the same in memory.

Ollama has one runner per file of weights and set of runner options, and lists it in `/api/ps` under the name it was
loaded by. The runner also serves every other name of the same weights (`ollama cp`, a Modelfile with its own SYSTEM).
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
SHOW_RETRY_SECONDS = 10.0
DERIVED_PREFIX = "switchyard/"
"""Prefix of derived names, created here for the same weights with another context length (`derived_name`)."""
VERSION_LENGTH = 12
_DERIVED = re.compile(rf"{DERIVED_PREFIX}.+:ctx(?P<context>[0-9]+)-(?P<version>[0-9a-f]{{{VERSION_LENGTH}}})")


def derived_name(installed: Installed, context_length: int) -> str:
    """Return the name of a model with another context length built in, for which `/v1` has no parameter."""
    return f"{DERIVED_PREFIX}{_stem(installed.name)}:ctx{context_length}-{installed.digest[:VERSION_LENGTH]}"


class Inventory:
    """Installed models. Thread-safe. `list` and `show` query the server; everything else is answered from memory."""

    def __init__(self, api: OllamaApi) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._installed: dict[str, Installed] | None = None
        self._listed_at = float("-inf")
        self._shown: dict[str, Shown] = {}
        self._show_after = float("-inf")
        self.serving = False
        """Whether the app serves requests. Before that, a server that doesn't answer must not delay the start."""

    @property
    def known(self) -> bool:
        """Whether the server has ever been listed."""
        return self._installed is not None

    @property
    def latest(self) -> Mapping[str, Installed]:
        """Installed models by name, as last listed."""
        return self._installed or {}

    def list(self, *, fresh: bool = False) -> Mapping[str, Installed]:
        """List the installed models, at most a second old; the last known ones if the server doesn't answer."""
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
        """Query a model's details, once per version."""
        if digest in self._shown or time.monotonic() < self._show_after:
            return
        try:
            self._shown[digest] = self._api.show(name)
        except OllamaUnreachable:
            self._show_after = time.monotonic() + SHOW_RETRY_SECONDS  # don't wait again for each of forty models
        except OllamaError:
            self._shown[digest] = Shown()

    def shown(self, digest: str | None) -> Shown | None:
        """Return the details of a version, None if unknown."""
        return self._shown.get(digest or "")

    def any_blob(self) -> str | None:
        """Return the path of some file in the models folder, as the server sees it."""
        return next((shown.blob for shown in [*self._shown.values()] if shown.blob), None)

    def source_of(self, name: str) -> str:
        """Return the model a name stands for: itself, or what a derived name was created from."""
        if not name.startswith(DERIVED_PREFIX):
            return name
        stem = name.removeprefix(DERIVED_PREFIX).rpartition(":")[0]
        return next((n for n in self.latest if not n.startswith(DERIVED_PREFIX) and _stem(n) == stem), name)

    def names_of(self, source: str) -> tuple[str, ...]:
        """Return a model's own name and those derived from it."""
        return (source, *(n for n in self.latest if n.startswith(DERIVED_PREFIX) and self.source_of(n) == source))

    def held_as(self, name: str, digest: str | None = None) -> str | None:
        """Return the key of what is in memory when this name is loaded; None if unknown.

        `digest` is the version, None for the installed one.
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
