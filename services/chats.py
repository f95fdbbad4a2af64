"""Conversations. Answers are jobs of the server: they go on when the page is closed, and are found again later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import structlog

from services.answers import Answer, ChatStream, GenerationError, Generator, Prompt
from services.store.errors import StoreError
from services.store.message_saver import MessageSaver
from services.store.records import Conversation, Message, MessageState, Place, Role, new_id
from services.store.repository import ConversationRepository

__all__ = [
    "ChatBusy",
    "ChatError",
    "ChatStream",
    "Chats",
    "Conversation",
    "ConversationNotFound",
    "EmptyMessage",
    "GenerationError",
    "Generator",
    "Message",
    "MessageNotFound",
    "MessageTooLong",
    "NotTheLast",
]

log = structlog.get_logger(__name__)

TITLE_LENGTH = 48
TITLE_LIMIT = 200
MESSAGE_LIMIT = 32_000
PAGE_MESSAGES = 20
PAGE_CHARACTERS = 200_000
"""Limit of a page's first part; 2,000 messages at once made a page of 4.9 MB."""
CLOSE_SECONDS = 5.0

BUSY = "An answer is being written in this conversation. Stop it, or wait until it is complete."


class ChatError(Exception):
    """A chat request was refused. The text is for people."""


class ConversationNotFound(ChatError):
    """The conversation does not exist."""


class MessageNotFound(ChatError):
    """The message does not exist."""


class ChatBusy(ChatError):
    """An answer is being written in the conversation."""


class EmptyMessage(ChatError):
    """The message is empty."""


class MessageTooLong(ChatError):
    """The message exceeds the limit."""


class NotTheLast(ChatError):
    """Only the last answer of a conversation can be retried."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A conversation without its messages, id and state of each message, and the answer being written, if any."""

    conversation: Conversation
    states: tuple[tuple[str, MessageState], ...]
    answering: Message | None


@dataclass(frozen=True, slots=True)
class _Running:
    """An answer being written, and its thread."""

    answer: Answer
    thread: threading.Thread


class Chats:
    """All conversations, and the answers being written: at most one per conversation."""

    def __init__(
        self, repository: ConversationRepository, generator: Generator, clock: Callable[[], float] = time.time
    ) -> None:
        self._repository = repository
        self._generator = generator
        self._clock = clock
        self._lock = threading.RLock()  # held while messages or conversations are added or removed
        self._running: dict[str, _Running] = {}
        self._saver = MessageSaver(repository.update)
        try:
            repository.mark_interrupted(clock())
        except StoreError as error:  # harmless: a row without a writer is shown as interrupted (`_newest`)
            log.warning("interrupted answers can't be marked", error=str(error))

    def conversations(self, limit: int | None = None, older_than: Place | None = None) -> list[Conversation]:
        """Return conversations without messages, the one last written to first: all, or `limit` after a place."""
        return self._repository.newest_first(limit, older_than)

    def get(self, conversation_id: str, since: int = 0) -> Conversation:
        """Return a conversation with its messages from position `since` on, in their current state.

        Raises ConversationNotFound.
        """
        conversation = self._repository.get(conversation_id, since)
        if conversation is None:
            raise ConversationNotFound("This conversation does not exist any more.")
        return replace(conversation, messages=tuple(map(self._newest, conversation.messages)))

    def page_start(self, conversation_id: str, before: int | None = None) -> int:
        """Return the position of the first message on a page: the latest page, or the one before position `before`."""
        return self._repository.page_start(conversation_id, before, PAGE_MESSAGES, PAGE_CHARACTERS)

    def outline(self, conversation_id: str, since: int) -> Outline:
        """Return a conversation's outline from position `since` on; no text is read. Raises ConversationNotFound."""
        found = self._repository.outline(conversation_id, since)
        if found is None:
            raise ConversationNotFound("This conversation does not exist any more.")
        running = self._writing_in(conversation_id)
        conversation, states = found
        now = tuple((message_id, self._state_now(message_id, state)) for message_id, state in states)
        return Outline(conversation, now, None if running is None else running.answer.message)

    def rename(self, conversation_id: str, title: str) -> None:
        """Set a conversation's title, cut to 200 characters. Raises ConversationNotFound and EmptyMessage."""
        title = " ".join(title.split())[:TITLE_LIMIT]
        if not title:
            raise EmptyMessage("A title needs at least one letter.")
        if not self._repository.rename(conversation_id, title):
            raise ConversationNotFound("This conversation does not exist any more.")

    def delete(self, conversation_id: str) -> None:
        """Stop the answer being written, if any, and delete the conversation. Raises ConversationNotFound."""
        with self._lock:
            running = self._writing_in(conversation_id)
            if running is not None:
                self._stop(running)
            if not self._repository.delete(conversation_id):
                raise ConversationNotFound("This conversation does not exist any more.")

    def start(self, text: str, model: str | None = None, message_id: str | None = None) -> Message:
        """Begin a conversation with a user's message; return the answer being written.

        Idempotent by `message_id`: a message already sent is returned instead. Raises EmptyMessage and MessageTooLong
        before anything is saved.
        """
        text = _sendable(text)
        now = self._clock()
        conversation = Conversation(new_id(), title_of(text), now, now)
        with self._lock:
            if (sent := self._sent(message_id)) is not None:
                return sent
            question, answer = self._exchange(conversation.id, text, model, message_id)

            def save() -> None:
                self._repository.add(replace(conversation, messages=(question, answer)))

            return self._begin(answer, Prompt((question,)), model, save)

    def send(self, conversation_id: str, text: str, model: str | None = None, message_id: str | None = None) -> Message:
        """Append a user's message and begin the answer by `model` (None: the active one); return the answer.

        Idempotent by `message_id`: a message already sent is returned instead. Raises ConversationNotFound, ChatBusy,
        EmptyMessage and MessageTooLong.
        """
        text = _sendable(text)
        with self._lock:
            if (sent := self._sent(message_id)) is not None:
                return sent
            conversation = self._idle(conversation_id)
            question, answer = self._exchange(conversation_id, text, model, message_id)

            def save() -> None:
                if not self._repository.append(question, answer):
                    raise ConversationNotFound("This conversation does not exist any more.")

            asked = replace(conversation, messages=(*conversation.messages, question))
            return self._begin(answer, prompt_of(asked), model, save)

    def retry(self, message_id: str, model: str | None = None) -> Message:
        """Write another version of the last answer; an earlier version without text is replaced.

        A last message by the user without an answer gets one. Raises MessageNotFound, ChatBusy and NotTheLast.
        """
        with self._lock:
            conversation = self._idle(self.message(message_id).conversation_id)
            *before, last = conversation.messages
            if message_id not in (last.id, *last.versions):
                raise NotTheLast("Only the last answer can be retried.")
            answer = self._message(conversation.id, "assistant", "", model)
            if last.role == "user":
                prompt = prompt_of(conversation)
                return self._begin(answer, prompt, model, lambda: self._repository.append(answer))
            empty = not (last.content or last.thinking)
            kept = [old for old in last.versions or (last.id,) if not (empty and old == last.id)]
            answer = replace(answer, versions=(*kept, answer.id) if kept else ())
            save = partial(self._repository.add_version, answer, last.id, instead=empty)
            messages = prompt_of(replace(conversation, messages=tuple(before))).messages
            return self._begin(answer, Prompt(messages, conversation.latest_answer), model, save)

    def show(self, message_id: str) -> Message:
        """Show this version of an answer and continue from it. Raises MessageNotFound and ChatBusy."""
        with self._lock:
            message = self.message(message_id)
            running = self._writing_in(message.conversation_id)
            if running is not None and message_id in running.answer.message.versions:
                raise ChatBusy(BUSY)
            if not self._repository.show(message_id):
                raise MessageNotFound("This message does not exist any more.")
            return message

    def stop(self, message_id: str) -> Message:
        """End an answer with what has arrived; does nothing to a final one. Raises MessageNotFound."""
        running = self._running.get(message_id)
        if running is not None:
            return self._stop(running)
        message = self.message(message_id)
        if message.state == "interrupted":  # its row may still be in state streaming
            self._saver.put(message)
        return message

    def message(self, message_id: str) -> Message:
        """Return one message in its current state. Raises MessageNotFound."""
        running = self._running.get(message_id)
        if running is not None:
            return running.answer.message
        stored = self._repository.message(message_id)
        if stored is None:
            raise MessageNotFound("This message does not exist any more.")
        return self._newest(stored)

    def follow(self, message_id: str) -> Iterator[Message | None]:
        """Yield a message now and whenever it has grown, until it is final; None every 10 s without a change.

        Raises MessageNotFound at once, not when iterated.
        """
        running = self._running.get(message_id)
        return iter((self.message(message_id),)) if running is None else running.answer.follow()

    def close(self) -> None:
        """Stop every answer, and wait a few seconds for their threads and for unsaved messages."""
        deadline = time.monotonic() + CLOSE_SECONDS
        all_running = list(self._running.values())
        for running in all_running:
            running.answer.stop()
        for running in all_running:
            running.thread.join(max(0.0, deadline - time.monotonic()))
        self._saver.close(max(0.0, deadline - time.monotonic()))

    def _idle(self, conversation_id: str) -> Conversation:
        """Return the conversation. Raises ChatBusy if an answer is being written in it."""
        if self._writing_in(conversation_id) is not None:
            raise ChatBusy(BUSY)
        return self.get(conversation_id)

    def _writing_in(self, conversation_id: str) -> _Running | None:
        of_it = (r for r in list(self._running.values()) if r.answer.message.conversation_id == conversation_id)
        return next((r for r in of_it if not r.answer.message.final), None)

    def _state_now(self, message_id: str, stored: MessageState) -> MessageState:
        running = self._running.get(message_id)
        live = running.answer.message if running is not None else self._saver.unsaved(message_id)
        if live is not None:
            return live.state
        return "interrupted" if stored == "streaming" else stored

    def _newest(self, stored: Message) -> Message:
        """Return the current state of a stored message.

        A row in state `streaming` that no thread writes, such as one from a restored backup, counts as interrupted.
        """
        running = self._running.get(stored.id)
        live = running.answer.message if running is not None else self._saver.unsaved(stored.id)
        if live is not None:
            return replace(live, versions=stored.versions)
        if stored.final:
            return stored
        again = self._repository.message(stored.id)  # the answer may have ended after the row was read
        if again is not None and again.final:
            return again
        return replace(stored, state="interrupted", finished_at=stored.created_at)

    def _sent(self, message_id: str | None) -> Message | None:
        return None if message_id is None else self._repository.message(message_id)

    def _exchange(
        self, conversation_id: str, text: str, model: str | None, message_id: str | None
    ) -> tuple[Message, Message]:
        """Return a new question and its empty answer."""
        question = self._message(conversation_id, "user", text)
        question = question if message_id is None else replace(question, id=message_id)
        return question, self._message(conversation_id, "assistant", "", model)

    def _message(self, conversation_id: str, role: Role, text: str, model: str | None = None) -> Message:
        """Return a new message: a complete one, or an assistant's that is about to be written."""
        now = self._clock()
        growing = role == "assistant"
        return Message(
            id=new_id(),
            conversation_id=conversation_id,
            role=role,
            content=text,
            model=model,
            state="streaming" if growing else "complete",
            error=None,
            created_at=now,
            finished_at=None if growing else now,
            tokens=None,
            seconds=None,
        )

    def _begin(self, message: Message, prompt: Prompt, model: str | None, save: Callable[[], object]) -> Message:
        """Save the answer `message`, then write it in a thread of its own."""
        answer = Answer(message, self._saver.put, self._clock)
        thread = threading.Thread(
            target=self._write, args=(answer, prompt, model), name=f"answer-{message.id[:8]}", daemon=True
        )
        self._running[message.id] = _Running(answer, thread)  # before saving: a row without a writer is interrupted
        try:
            save()
            thread.start()
        except BaseException:
            del self._running[message.id]
            raise
        return message

    def _write(self, answer: Answer, prompt: Prompt, model: str | None) -> None:
        try:
            answer.write(self._generator, model, prompt)
        finally:
            self._running.pop(answer.message.id, None)

    def _stop(self, running: _Running) -> Message:
        message = running.answer.stop()
        self._running.pop(message.id, None)
        return message


def _sendable(text: str) -> str:
    """Return a typed message in the form that is stored. Raises EmptyMessage and MessageTooLong."""
    text = text.replace("\r\n", "\n").strip()  # a form sends each line break as two characters
    if not text:
        raise EmptyMessage("Write something first.")
    if len(text) > MESSAGE_LIMIT:
        raise MessageTooLong(
            f"This message has {len(text):,} characters; {MESSAGE_LIMIT:,} is the limit. Send it in parts."
        )
    return text


def prompt_of(conversation: Conversation) -> Prompt:
    """Return the prompt for the next answer: all final messages with text, in order."""
    messages = tuple(message for message in conversation.messages if message.final and message.content)
    return Prompt(messages, conversation.latest_answer)


def title_of(text: str) -> str:
    """Make a title from a first message: its beginning, cut between words if possible."""
    line = " ".join(text.split())
    if len(line) <= TITLE_LENGTH:
        return line
    beginning, _, rest = line[: TITLE_LENGTH + 1].rpartition(" ")
    return f"{beginning or rest[:TITLE_LENGTH]}…"
