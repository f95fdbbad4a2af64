"""Starting the app anew in its place, with its models loaded and its address open all the while."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.config import ConfigError, Settings, load_settings
from services.state_folder import StateError

ANSWER_SECONDS = 0.5
"""How long the answer to the request for it has to get out."""
NEED_A_FULL_START = ("host", "port", "state_dir")
FAILED = "switchyard.gateway_error"
"""Where the environment has the error of a first attempt to pass the request on, which must not be sent again."""
UNBEGUN = "switchyard.unbegun"
"""Where the app leaves the body of a request in its WSGI environ that the next run has to answer in its place."""


class RestartRefused(Exception):
    """The app goes on as it is. `code` is the contract's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Restart:
    """The wish to start anew. Who runs the app looks whether it is `due`; `possible` once somebody does.

    From the moment it is `requested` no request is begun: whoever runs the app keeps them for the next run.
    `switching_to` tells which model is being switched to, None when none is; `check_state` raises StateError when the
    next run could not write its state.
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
        """Whether what is loaded is left for the next run."""
        return self.due or self._abandoned

    def abandon(self) -> None:
        """The app ends without anybody having wished it: what is loaded stays, as after a crash."""
        self._abandoned = True

    def request(self) -> None:
        """Restart in a moment. Asking twice is asking once. Raises RestartRefused."""
        if self.requested:
            return
        self._check()
        self._due_at = time.monotonic() + ANSWER_SECONDS
        self.requested = True

    def _check(self) -> None:
        """A worker that could not start again would take the whole app with it, and with that every model."""
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
