"""Saves growing messages: nobody waits for the database, and nothing is lost while it can't be written."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from services.scheduling import Scheduler, Threads
from services.store.records import Message

log = structlog.get_logger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""A write that failed is tried again after a pause that doubles each time, up to this."""


class MessageSaver:
    """Writes the newest state of each message, in a greenlet of its own.

    A newer state replaces an older one that still waits, so that a slow database is asked for no more than it can
    take. Until a state is written, `unsaved` gives it.
    """

    def __init__(self, write: Callable[[Message], object], scheduler: Scheduler | None = None) -> None:
        self._write = write
        self._scheduler = scheduler or Threads()
        self._changed = self._scheduler.condition()
        self._waiting: dict[str, Message] = {}
        self._closed = False
        self._ended = False
        self._scheduler.spawn("message-saver", self._run)

    def put(self, message: Message) -> None:
        """Have this state of a message saved soon. Returns at once."""
        with self._changed:
            self._waiting[message.id] = message
            self._changed.notify_all()

    def unsaved(self, message_id: str) -> Message | None:
        """The newest state of a message, unless the database has it already."""
        return self._waiting.get(message_id)

    def close(self, timeout: float = 5.0) -> None:
        """Try once more to save what waits, for at most `timeout` seconds."""
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
        """Wait out the pause after a failure, then until there is something to save. False once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, pause)
            self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            return not self._closed

    def _save_all(self) -> bool:
        """Try to save every message that waits, each by itself: one that can't be saved holds up no other."""
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
