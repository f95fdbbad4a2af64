"""Restarts the app in place; its models stay loaded and its address stays open."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.config import ConfigError, Settings, load_settings
from services.state_folder import StateError

ANSWER_SECONDS = 0.5
"""Delay before a requested restart, so that the response to the request gets out."""
NEED_A_FULL_START = ("host", "port", "state_dir")
FAILED = "switchyard.gateway_error"
"""Where the environment has the error of a first attempt to pass the request on, which must not be sent again."""
UNBEGUN = "switchyard.unbegun"
"""Key in the WSGI environ for the body of a request that the next run has to answer."""


class RestartRefused(Exception):
    """The app can't restart and goes on. `code` is an error code of the contract."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Restart:
    """The request to restart. The worker polls `due`, and sets `possible` where it supports restarts.

    Once `requested`, no request is begun; the worker keeps new ones for the next run. `switching_to` returns the target
    of the switch under way, None without one; `check_state` raises StateError if the next run could not write its
    state.
    """

    def __init__(
        self,
        settings: Settings,
        switching_to: Callable[[], str | None] = lambda: None,
        check_state: Callable[[], object] = lambda: None,
    ) -> None:
        self.possible = False
        self.requested = False
        self._settings = settings
        self._switching_to = switching_to
        self._check_state = check_state
        self._due_at = 0.0
        self._abandoned = False

    @property
    def due(self) -> bool:
        return self.requested and time.monotonic() >= self._due_at

    @property
    def models_stay(self) -> bool:
        """Whether loaded models are left for the next run."""
        return self.due or self._abandoned

    def abandon(self) -> None:
        """Note that the app ends without having been asked to: loaded models stay, as after a crash."""
        self._abandoned = True

    def request(self) -> None:
        """Request a restart in a moment; idempotent. Raises RestartRefused."""
        if self.requested:
            return
        self._check()
        self._due_at = time.monotonic() + ANSWER_SECONDS
        self.requested = True

    def _check(self) -> None:
        """Refuse a restart that could fail: a worker that can't boot would end the app and every model."""
        if not self.possible:
            raise RestartRefused(
                "restart_unavailable", "Whatever runs Switchyard here can't restart it: do that by hand."
            )
        if (target := self._switching_to()) is not None:
            raise RestartRefused(
                "switch_in_progress",
                f"The switch to {target} would be lost by a restart. Wait for it, or cancel it.",
            )
        try:
            wanted = load_settings()
        except ConfigError as error:
            raise RestartRefused("settings_unusable", f"Switchyard goes on as it is. {error}") from None
        try:
            self._check_state()
        except StateError as error:
            raise RestartRefused("state_unwritable", f"Switchyard goes on as it is. {error}") from None
        changed = [name for name in NEED_A_FULL_START if getattr(wanted, name) != getattr(self._settings, name)]
        if changed:
            raise RestartRefused(
                "settings_unusable",
                f"Switchyard goes on as it is: {' and '.join(changed)} changed, which takes stopping and starting it.",
            )
