"""Engine `openai`: any OpenAI-compatible API, on another host or on this one.

Its models are ready as long as they have a key: nothing is loaded, no memory is held, no request is sent but the
clients' own. So every listed model is found loaded at each start, and adopted. Unloading one only keeps it from
answering, until the next switch to it or the next start. Whether the API answers is known from its answers: a probe
would cost money.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from services.cancellation import CancelToken
from services.engines.openai.account import Account, NoKey, account_of
from services.engines.port import (
    HOST_DEVICE,
    Endpoint,
    EngineError,
    LoadFailed,
    Model,
    Need,
    NoSleepMixin,
    OnExit,
    Report,
)


class OpenAI:
    """Engine `openai`. `account` is that of the settings; `environ` has the keys that models name."""

    name = "openai"
    outlives_app = True
    adopts_from_others = False

    def __init__(self, account: Account, environ: Mapping[str, str] = os.environ) -> None:
        self._account = account
        self._environ = environ
        self._lock = threading.Lock()
        self._unloaded: set[str] = set()
        """Models that were unloaded by hand."""

    def discover(self) -> Sequence[Model]:
        return ()  # only listed models: an API may have hundreds, each of which costs money

    def describe(self, model: Model) -> Model:
        host = urlsplit(str(model.options.get("base_url") or self._account.base_url)).netloc
        known = replace(model, remote=True, description=model.description or f"{model.source} at {host}")
        try:
            account_of(model, self._account, self._environ)
        except NoKey as missing:
            return replace(known, fault=str(missing))
        return known

    def estimate(self, _model: Model) -> Need:
        return Need(HOST_DEVICE, 0, "declared")

    def settings_key(self, model: Model) -> str:
        return f"{model.options.get('base_url') or self._account.base_url} {model.source}"

    def fetch(self, _model: Model, _report: Report, _token: CancelToken, /) -> None:
        """Do nothing: there are no files."""

    def launch(self, model: Model, _on_exit: OnExit) -> RemoteInstance:
        instance = self._instance(model)
        with self._lock:
            self._unloaded.discard(model.id)
        return instance

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        return [model for model in models if model.fault is None and model.id not in self._unloaded]

    def adopt(self, model: Model, _on_exit: OnExit, /) -> RemoteInstance | None:
        return None if model.id in self._unloaded else self._instance(model)

    def remove(self, model: Model, _keep: Collection[str], /) -> None:
        raise EngineError(f"{model.id} has no files here. To hide it, take it out of the settings file.")

    def prepare(self) -> None:
        """Do nothing: there is nothing to load."""

    def close(self) -> None:
        """Do nothing: it holds nothing."""

    def _instance(self, model: Model) -> RemoteInstance:
        try:
            account = account_of(model, self._account, self._environ)
        except NoKey as missing:
            raise EngineError(f"{model.id} can't be used: {missing}") from None
        return RemoteInstance(model, account.endpoint(model.source), self._unload)

    def _unload(self, model_id: str) -> None:
        with self._lock:
            self._unloaded.add(model_id)


class RemoteInstance(NoSleepMixin):
    """A remote model that may be asked, until it is stopped. It reports no exit: it has nothing that could end."""

    pid = None

    def __init__(self, model: Model, endpoint: Endpoint, on_stop: Callable[[str], None]) -> None:
        self.model = model
        self._endpoint = endpoint
        self._on_stop = on_stop
        self._stopped = False

    def wait_ready(self, _report: Report, _timeout: float) -> Endpoint:
        if self._stopped:
            raise LoadFailed(f"{self.model.id} was unloaded.")
        return self._endpoint

    def warm_up(self, _timeout: float) -> None:
        """Generate nothing: a token costs money, and makes nothing faster."""

    def responds(self, _timeout: float, /) -> bool | None:
        return None

    def usage(self) -> None:
        return None

    def stop(self, _grace: float) -> None:
        self._stopped = True
        self._on_stop(self.model.id)

    def log_tail(self) -> str:
        return ""

    def warning(self) -> str | None:
        return None
