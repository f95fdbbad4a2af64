"""Routes a request to the instance of the model it names, and switches to that model first where permitted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from services.catalog import Catalog, UnknownModel
from services.config import Settings
from services.engines.port import Kind
from services.preferences import CurrentPreferences
from services.scheduling import Scheduler, ThreadScheduler
from services.switching.events import Board, InstanceView
from services.switching.jobs import Job, SwitchError, SwitchOptions
from services.switching.plan import Plan
from services.switching.switcher import Switcher

AUTO = "auto"
FIRST_PASS_WAIT_SECONDS = 5.0
"""How long a request waits after a start until it is known what the engines have loaded."""
CLIENT_POLL_SECONDS = 0.5
"""Interval at which a waiting request checks whether its client is still connected."""


class GatewayError(Exception):
    """A request can't be relayed.

    `code` is an error code of the contract; `retry_after` is seconds, None if a retry won't help. `plan` is what has to
    be confirmed first.
    """

    def __init__(self, code: str, message: str, retry_after: int | None = None, plan: Plan | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.plan = plan


class ClientGone(Exception):
    """The client disconnected while its request waited."""


class Admission:
    """A request counted in on an instance. `release` counts it out, and is idempotent."""

    def __init__(self, instance: InstanceView) -> None:
        self.instance = instance
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self.instance.traffic.leave()


class Router:
    """Admits requests to running instances, and holds the bounded, visible queue of those that wait for one."""

    def __init__(
        self,
        settings: Settings,
        preferences: CurrentPreferences,
        board: Board,
        catalog: Catalog,
        switcher: Switcher,
        scheduler: Scheduler | None = None,
    ) -> None:
        self._settings = settings
        self._preferences = preferences
        self._board = board
        self._catalog = catalog
        self._switcher = switcher
        self._scheduler = scheduler or ThreadScheduler()
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()

    @property
    def waiting(self) -> Mapping[str, int]:
        """Number of waiting requests, per model."""
        return {model: count for model, count in self._waiting.items() if count}

    def admit(self, name: str | None, client_left: Callable[[], bool] = lambda: False) -> Admission:
        """Admit a request to the model called `name` (None or "auto": the active one).

        Blocks while the model is switched to. Raises UnknownModel, GatewayError, and ClientGone once `client_left`
        returns True.
        """
        if name is not None and (admission := self.try_admit(name)) is not None:
            return admission
        if not self._switcher.wait_first_pass(FIRST_PASS_WAIT_SECONDS):
            raise GatewayError("starting", "Switchyard is finding out what is loaded. Try again in a moment.", 1)
        model_id = self._resolve(name)
        admission = self._try_enter(model_id)
        if admission is not None:
            return admission
        if not self._preferences.current.switch_on_request and not self._is_switch_target(model_id):
            raise GatewayError(
                "model_not_loaded",
                f"{model_id} is not loaded, and switching on request is switched off. "
                "Switch to it first with POST /v1/models/switch.",
            )
        with self._place_in_queue(model_id):
            return self._wait_for(model_id, client_left)

    def try_admit(self, name: str | None, kind: Kind | None = None) -> Admission | None:
        """Admit a request if its model is running, and of `kind` if that is given.

        None if that takes waiting or an error. Never blocks.
        """
        if name is None or name == AUTO:
            return self._try_enter(self._board.current.active_model or "", kind)
        return self._try_enter(self._catalog.id_of(name), kind)

    def would_switch(self, name: str | None) -> bool:
        """Return whether a request for `name` (None or "auto": the active model) would cause a switch.

        A model that runs or is already being switched to causes none.
        """
        if not self._preferences.current.switch_on_request:
            return False
        try:
            model_id = self._resolve(name)
        except (GatewayError, UnknownModel):
            return False
        snapshot = self._board.current
        if model_id in snapshot.queued or self._is_switch_target(model_id):
            return False
        view, switch = snapshot.instances.get(model_id), snapshot.switch
        going = switch is not None and any(unloading.model == model_id for unloading in switch.unloads)
        return going or view is None or view.state not in ("running", "loading")

    def _resolve(self, name: str | None) -> str:
        if name is not None and name != AUTO:
            return self._catalog.get(name).id
        snapshot = self._board.current
        if snapshot.active_model is not None:
            return snapshot.active_model
        if snapshot.switch is not None and self._becomes_active(snapshot.switch.to_model):
            return snapshot.switch.to_model
        if self._settings.ollama_model is not None:
            return self._catalog.get(self._settings.ollama_model).id
        raise GatewayError("model_not_loaded", "No model is loaded. Name one, or switch to one first.")

    def _becomes_active(self, model_id: str) -> bool:
        """Whether a model becomes the active one if there is none, once it is loaded."""
        model = self._catalog.models.get(model_id)
        return model is not None and model.kind == "text" and not model.remote

    def _try_enter(self, model_id: str, kind: Kind | None = None) -> Admission | None:
        instance = self._board.current.instances.get(model_id)
        if instance is None or instance.state != "running" or (kind is not None and instance.entry.kind != kind):
            return None
        return Admission(instance) if instance.traffic.enter() else None

    def _is_switch_target(self, model_id: str) -> bool:
        switch = self._board.current.switch
        return switch is not None and switch.to_model == model_id

    @contextmanager
    def _place_in_queue(self, model_id: str) -> Iterator[None]:
        with self._lock:
            if self._waiting.total() >= self._settings.queue_limit:
                raise GatewayError(
                    "queue_full",
                    f"{self._settings.queue_limit} requests are waiting for a model already. Try again later.",
                    retry_after=5,
                )
            self._waiting[model_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting[model_id] -= 1

    def _wait_for(self, model_id: str, client_left: Callable[[], bool]) -> Admission:
        """Request a switch, again if the model is unloaded before the request is admitted."""
        deadline = self._scheduler.now() + self._settings.queue_timeout_seconds
        while self._scheduler.now() < deadline:
            options = SwitchOptions(activate=False, lasting=False)
            job = self._switcher.switch(model_id, requested_by="request", replace="queue", options=options)
            try:
                self._wait_done(job, deadline, client_left)
            finally:  # a switch that only disconnected clients waited for is cancelled
                self._switcher.withdraw(job)
            if isinstance(job.error, SwitchError):
                raise _refused(job.error)
            admission = self._try_enter(model_id)
            if admission is not None:
                return admission
        raise GatewayError(
            "queue_timeout",
            f"{model_id} was not ready within {self._settings.queue_timeout_seconds:.0f} s.",
            retry_after=30,
        )

    def _wait_done(self, job: Job, deadline: float, client_left: Callable[[], bool]) -> None:
        """Wait until a job has ended, or until the deadline. Raises ClientGone."""
        while not job.wait_done(CLIENT_POLL_SECONDS):
            if client_left():
                raise ClientGone
            if self._scheduler.now() > deadline:
                return


def _refused(error: SwitchError) -> GatewayError:
    plan = error.details.get("plan") if error.code == "confirmation_required" else None
    retry_after = 2 if error.code == "stopping" else None
    return GatewayError(error.code, error.message, retry_after, plan if isinstance(plan, Plan) else None)
