"""Acts on models that are unused: unloads them, and goes back to the home model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from services.catalog import UnknownModel
from services.config import Preferences
from services.engines.port import Engine
from services.switching.context import SwitchingContext
from services.switching.events import InstanceView, Snapshot
from services.switching.jobs import SwitchError, SwitchOptions
from services.switching.switcher import Switcher
from services.switching.traffic import Traffic

log = structlog.get_logger(__name__)

REQUESTER = "idle"


@dataclass(frozen=True, slots=True)
class Unused:
    """A running model that answers nobody, and for how many seconds. `kept`: it may not be unloaded for that."""

    model: str
    seconds: float
    kept: bool = False


@dataclass(slots=True)
class _Use:
    """How much a model was used when looked at last, and since when (monotonic seconds) that has not changed."""

    count: int
    since: float


def to_unload(unused: Sequence[Unused], loaded: int, preferences: Preferences) -> list[str]:
    """Return the models that have been unused for too long, the longest unused first.

    `loaded` is the number of loaded models; with `keep_at_least_one` the last of them stays. Pure.
    """

    def is_due(model: Unused) -> bool:
        limit = preferences.idle_unload_models.get(model.model, preferences.idle_unload_seconds)
        return bool(limit) and not model.kept and model.seconds >= (limit or 0.0)

    due = sorted(filter(is_due, unused), key=lambda model: (-model.seconds, model.model))
    most = loaded - 1 if preferences.keep_at_least_one else loaded
    return [model.model for model in due[:most]]


def goes_home(active: str | None, unused: Sequence[Unused], preferences: Preferences) -> bool:
    """Return whether the active model is a guest that has been unused for long enough. Pure."""
    home = preferences.home_model
    if home is None or active in (None, home):
        return False
    return any(u.model == active and u.seconds >= preferences.home_after_seconds for u in unused)


class IdleWatch:
    """Compares what is loaded with the preferences at each `check`. By monotonic time: clock steps change nothing."""

    def __init__(self, context: SwitchingContext, switcher: Switcher) -> None:
        self._scheduler = context.scheduler
        self._preferences = context.preferences
        self._pins = context.pins
        self._board = context.board
        self._engines: Mapping[str, Engine] = context.engines
        self._switcher = switcher
        self._uses: dict[Traffic, _Use] = {}

    def check(self) -> None:
        """Unload what is unused, or go home. Does nothing while a switch is under way or waits."""
        snapshot, preferences = self._board.current, self._preferences.current
        running = [v for v in snapshot.instances.values() if v.state == "running" and not (v.shares or v.entry.remote)]
        unused = self._measure(running, snapshot, preferences)
        if snapshot.switch is not None or snapshot.queued:
            return
        if goes_home(snapshot.active_model, unused, preferences):
            self._start_again(snapshot.active_model)
            self._go_home(str(preferences.home_model))
            return
        for model in to_unload(unused, len(running), preferences):
            self._start_again(model)  # one that can't be unloaded is not tried again at each check
            self._unload(model)

    def _measure(
        self, running: Sequence[InstanceView], snapshot: Snapshot, preferences: Preferences
    ) -> Sequence[Unused]:
        now = self._scheduler.now()
        before, self._uses = self._uses, {}
        unused = []
        for view in running:
            traffic = view.traffic
            use = before.get(traffic)
            if use is None or traffic.in_flight or traffic.answered != use.count:
                use = _Use(traffic.answered, now)
            self._uses[traffic] = use
            names = {view.model, *(v.model for v in snapshot.instances.values() if v.shares == view.model)}
            held = names.intersection(preferences.preserve_models) or names & self._pins.current.keys()
            kept = bool(held) or self._serves_others(view)
            unused.append(Unused(view.model, now - use.since, kept))
        return unused

    def _serves_others(self, view: InstanceView) -> bool:
        """Whether another program may have loaded it and may be using it: its use can't be seen from here."""
        return view.entry.started_elsewhere or (view.adopted and self._engines[view.engine].adopts_from_others)

    def _start_again(self, model_id: str | None) -> None:
        view = self._board.current.instances.get(model_id or "")
        if view is not None and view.traffic in self._uses:
            self._uses[view.traffic].since = self._scheduler.now()

    def _unload(self, model_id: str) -> None:
        log.info("unloading a model that is unused", model=model_id)
        try:
            self._switcher.stop(model_id, requested_by=REQUESTER)
        except (SwitchError, UnknownModel) as error:
            log.warning("an unused model can't be unloaded", model=model_id, reason=str(error))

    def _go_home(self, model_id: str) -> None:
        log.info("going back to the home model", model=model_id)
        try:
            options = SwitchOptions(confirm=True)  # the preference is the consent
            self._switcher.switch(model_id, requested_by=REQUESTER, replace="refuse", options=options)
        except (SwitchError, UnknownModel) as error:
            log.warning("the home model can't be loaded", model=model_id, reason=str(error))
