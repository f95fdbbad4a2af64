"""One answer while it is written: it grows, is saved periodically, and can be followed by any number of readers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from services.cancellation import Cancelled, CancelToken
from services.store.records import Message, MessageState
from services.text import fix_surrogates
from services.yielding import Yielder

log = structlog.get_logger(__name__)

SAVE_SECONDS = 0.5
FOLLOW_SECONDS = 0.05
HEARTBEAT_SECONDS = 10.0


class GenerationError(Exception):
    """An answer could not be generated, or broke off. The text is for people."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The messages before an answer, oldest first, and the previous answer, which records how many of them fitted."""

    messages: tuple[Message, ...]
    last_answer: Message | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer: of its text, or of the model's thoughts before it (`thought`).

    `all_before`: all earlier text was thought too. Some models only mark where their thoughts end.
    """

    text: str
    thought: bool = False
    all_before: bool = False


class ChatStream(Protocol):
    """An answer as it is generated. Iterating yields deltas, and raises GenerationError if the answer breaks off."""

    @property
    def model(self) -> str:
        """Id of the model that answers."""

    @property
    def told_from(self) -> int:
        """Index of the first prompt message that the model was given; earlier ones did not fit."""

    @property
    def context_full(self) -> bool:
        """Whether the answer ended because the context was full; valid after the last delta."""

    def __iter__(self) -> Iterator[Delta]: ...


class Generator(Protocol):
    """Generates answers."""

    def stream_chat(self, model: str | None, prompt: Prompt, token: CancelToken) -> AbstractContextManager[ChatStream]:
        """Request an answer from `model` (None: the active one).

        Leaving the context stops the generation, and so does cancelling `token`, at any time. Raises GenerationError
        and Cancelled.
        """


class Answer:
    """The only writer of an answer's message. Thread-safe.

    The first call that makes the message final wins; later changes are ignored. `save` is called with each state to
    keep, in order; it must neither block nor raise.
    """

    def __init__(self, message: Message, save: Callable[[Message], object], clock: Callable[[], float]) -> None:
        self._changed = threading.Condition()
        self._message = message
        self._save = save
        self._clock = clock
        self._token = CancelToken()
        self._deltas: list[tuple[float, Delta]] = []
        """Deltas not yet merged into the message, with seconds since the first delta. Merging each one at once would
        take time quadratic in the length."""
        self._first_at: float | None = None
        self._saved_at = time.monotonic()

    @property
    def message(self) -> Message:
        """The message in its current state."""
        with self._changed:
            if self._deltas:
                self._message = _append_deltas(self._message, self._deltas)
                self._deltas = []
            return self._message

    def write(self, generator: Generator, model: str | None, prompt: Prompt) -> None:
        """Generate the whole answer. Errors end up in the message; nothing is raised except by `save`."""
        try:
            with generator.stream_chat(model, prompt, self._token) as stream:
                first = prompt.messages[stream.told_from].id if stream.told_from else None
                if self._update(model=stream.model, told_from=first):
                    self._consume(stream)
                self._update(context_full=stream.context_full)
                self.finish("complete")
        except Cancelled:
            self.finish("stopped")
        except GenerationError as error:
            self.finish("failed", str(error))
        except Exception as error:
            log.exception("an answer failed unexpectedly", message=self._message.id)
            reason = type(error).__name__
            self.finish("failed", f"Switchyard failed to pass the answer on ({reason}); its log has the details.")

    def stop(self) -> Message:
        """End the answer with what has arrived, and stop the generation. Does not wait for the engine."""
        message = self.finish("stopped")
        self._token.cancel()
        return message

    def finish(self, state: MessageState, error: str | None = None) -> Message:
        """Make the message final, unless it is; return it."""
        with self._changed:
            told = None if error is None else fix_surrogates(error)
            if self._update(state=state, error=told, finished_at=self._clock()):
                self._changed.notify_all()
                self._save(self._message)
            return self.message

    def follow(self) -> Iterator[Message | None]:
        """Yield the message now and whenever it has grown, at most 20 times a second.

        Yields None after 10 s without a change.
        """
        seen = self.message
        yield seen
        while not seen.final:
            newer = self._wait(lambda last=seen: bool(self._deltas) or self._message is not last, HEARTBEAT_SECONDS)  # type: ignore[misc]
            yield None if newer is seen else newer
            seen = newer
            self._wait(lambda: self._message.final, FOLLOW_SECONDS)

    def _wait(self, ready: Callable[[], bool], timeout: float) -> Message:
        with self._changed:
            self._changed.wait_for(ready, timeout)
            return self.message

    def _consume(self, stream: ChatStream) -> None:
        yielding = Yielder()  # reading from an engine that is faster than us never blocks, so it never yields
        for delta in stream:
            if not self._append(delta):
                return
            yielding()

    def _append(self, delta: Delta) -> bool:
        """Append a delta; return False if the message is final."""
        with self._changed:
            if self._message.final:
                return False
            now = time.monotonic()
            self._first_at = now if self._first_at is None else self._first_at
            self._deltas.append((now - self._first_at, delta))
            self._changed.notify_all()
            if now - self._saved_at >= SAVE_SECONDS:
                self._saved_at = now
                self._save(self.message)
            return True

    def _update(self, **changes: object) -> bool:
        """Change the message unless it is final; return whether it was changed."""
        with self._changed:
            message = self.message
            if message.final:
                return False
            self._message = replace(message, **changes)  # type: ignore[arg-type]
            return True


def _append_deltas(message: Message, deltas: list[tuple[float, Delta]]) -> Message:
    """Return the message with deltas appended, each given with its seconds since the first delta."""
    thinking, said, thought_until = [message.thinking], [message.content], message.thinking_seconds
    for seconds, delta in deltas:
        if delta.all_before:
            thinking, said, thought_until = ["".join([*thinking, *said]).strip()], [], seconds
        elif delta.thought:
            thinking.append(delta.text)
            thought_until = seconds
        else:
            said.append(delta.text)
    return replace(
        message,
        thinking="".join(thinking),
        content="".join(said),
        thinking_seconds=thought_until,
        tokens=(message.tokens or 0) + len(deltas),
        seconds=deltas[-1][0],
    )
