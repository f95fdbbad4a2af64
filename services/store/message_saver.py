"""Saves messages while they are written: no caller waits for the database, and nothing is lost while it fails."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from services.scheduling import Scheduler, ThreadScheduler
from services.store.records import Message

log = structlog.get_logger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""Limit of the pause before a retry, which doubles with each failure."""


class MessageSaver:
    """Writes the newest state of each message, in a greenlet of its own.

    A newer state replaces a queued older one, so that a slow database gets no more writes than it can take. `unsaved`
    returns a state until it is written.
    """

    def __init__(self, write: Callable[[Message], object], scheduler: Scheduler | None = None) -> None:
        self._write = write
        self._scheduler = scheduler or ThreadScheduler()
        self._changed = self._scheduler.condition()
        self._waiting: dict[str, Message] = {}
        self._closed = False
        self._ended = False
        self._scheduler.spawn("message-saver", self._run)

    def put(self, message: Message) -> None:
        """Queue a state of a message. Never blocks."""
        with self._changed:
            self._waiting[message.id] = message
            self._changed.notify_all()

    def unsaved(self, message_id: str) -> Message | None:
        """Return the newest state of a message that is not yet in the database, else None."""
        return self._waiting.get(message_id)

    def close(self, timeout: float = 5.0) -> None:
        """Try once more to save what is queued, at most `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended, timeout)

    def _run(self) -> None:
        pause = 0.0
        while self._wait(pause):
            longer = min(max(FIRST_PAUSE_SECONDS, 2 * pause), LONGEST_PAUSE_SECONDS)
            pause = 0.0 if self._save_all() else longer
        self._save_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait(self, pause: float) -> bool:
        """Wait out the pause after a failure, then until there is something to save. Return False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, pause)
            self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            return not self._closed

    def _save_all(self) -> bool:
        """Try to save every queued message independently; return whether all were saved."""
        failed = [message for message in list(self._waiting.values()) if not self._save(message)]
        return not failed

    def _save(self, message: Message) -> bool:
        try:
            self._write(message)
        except Exception as error:
            log.warning("a message could not be saved; it will be tried again", message=message.id, error=str(error))
            return False
        with self._changed:
            if self._waiting.get(message.id) is message:
                del self._waiting[message.id]
        return True
