"""The models that are loaded when the app starts."""

from __future__ import annotations

import structlog

from services.catalog import UnknownModel
from services.switching.context import SwitchingContext
from services.switching.jobs import SwitchError, SwitchOptions
from services.switching.reconciler import FIRST_PASS_SECONDS
from services.switching.switcher import Switcher

log = structlog.get_logger(__name__)

REQUESTER = "preload"


class FirstLoads:
    """Loads the last active model (`last_used`) and those of `preload`, as far as they fit beside what is loaded.

    `last_active` is the id of the model that was active last in the run before, None if unknown.
    """

    def __init__(self, context: SwitchingContext, switcher: Switcher, last_active: str | None) -> None:
        self._board = context.board
        self._preferences = context.preferences
        self._longest = context.settings.longest_switch_seconds
        self._switcher = switcher
        self._last_active = last_active

    def run(self) -> None:
        """Load one after the other; return when the last load has ended. Failures are logged.

        The last active model is only loaded where nothing stayed loaded.
        """
        preferences = self._preferences.current
        if not preferences.last_used and not preferences.preload:
            return
        self._switcher.wait_first_pass(FIRST_PASS_SECONDS)
        stayed = [view for view in self._board.current.instances.values() if not view.entry.remote]
        if preferences.last_used and self._last_active is not None and not stayed:
            self._load(self._last_active, activate=True)
        for model_id in preferences.preload:
            if model_id not in self._board.current.instances:
                self._load(model_id, activate=False)

    def _load(self, model_id: str, *, activate: bool) -> None:
        try:
            options = SwitchOptions(auto_unload=False, activate=activate)
            job = self._switcher.switch(model_id, requested_by=REQUESTER, replace="queue", options=options)
            job.wait_done(self._longest)
            error: Exception | None = job.error
        except (SwitchError, UnknownModel) as refusal:
            error = refusal
        if error is not None:
            log.warning("a model can't be loaded at the start", model=model_id, reason=str(error))
