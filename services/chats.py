"""Conversations. Answers are jobs of the server: they go on when the page closes, and are found again after it."""

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
"""What a page shows at first: 2,000 messages at once made one of 4.9 MB."""
CLOSE_SECONDS = 5.0


class ChatError(Exception):
    """A chat can't do what was asked. The text is for people."""


class ConversationNotFound(ChatError):
    """There is no such conversation."""


class MessageNotFound(ChatError):
    """There is no such message."""


class ChatBusy(ChatError):
    """An answer is being written in that conversation."""


class EmptyMessage(ChatError):
    """There is nothing to send."""


class MessageTooLong(ChatError):
    """The message exceeds the limit."""


class NotTheLast(ChatError):
    """Only the last answer of a conversation can be written anew."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A conversation without its messages, the id and state of each, and the answer that is being written in it."""

    conversation: Conversation
    states: tuple[tuple[str, MessageState], ...]
    answering: Message | None


@dataclass(frozen=True, slots=True)
class _Running:
    """An answer being written, and the thread that writes it."""

    answer: Answer
    thread: threading.Thread


class Chats:
    """Every conversation, and the answers being written. At most one at a time in each conversation."""

    def __init__(
        self, repository: ConversationRepository, generator: Generator, clock: Callable[[], float] = time.time
    ) -> None:
        self._repository = repository
        self._generator = generator
        self._clock = clock
        self._lock = threading.RLock()  # held by whoever changes what a conversation consists of
        self._running: dict[str, _Running] = {}
        self._saver = MessageSaver(repository.update)
        try:
            repository.mark_interrupted(clock())
        except StoreError as error:  # a row that nobody writes counts as interrupted all the same
            log.warning("answers that an earlier run left can't be marked now", error=str(error))

    def conversations(self, limit: int | None = None, older_than: Place | None = None) -> list[Conversation]:
        """Conversations without their messages, the last one written in first: all, or `limit` behind a place."""
        return self._repository.newest_first(limit, older_than)

    def get(self, conversation_id: str, since: int = 0) -> Conversation:
        """One conversation with its messages from position `since` on, as they are now. Raises ConversationNotFound."""
        conversation = self._repository.get(conversation_id, since)
        if conversation is None:
            raise ConversationNotFound("This conversation does not exist any more.")
        return replace(conversation, messages=tuple(map(self._newest, conversation.messages)))

    def page_start(self, conversation_id: str, before: int | None = None) -> int:
        """The position from which on a page shows messages: the latest ones, or those before another position."""
        return self._repository.page_start(conversation_id, before, PAGE_MESSAGES, PAGE_CHARACTERS)

    def outline(self, conversation_id: str, since: int) -> Outline:
        """What is there from position `since` on, without a word of it. Raises ConversationNotFound."""
        found = self._repository.outline(conversation_id, since)
        if found is None:
            raise ConversationNotFound("This conversation does not exist any more.")
        running = self._writing_in(conversation_id)
        conversation, states = found
        now = tuple((message_id, self._state_now(message_id, state)) for message_id, state in states)
        return Outline(conversation, now, None if running is None else running.answer.message)

    def rename(self, conversation_id: str, title: str) -> None:
        """Give it another title, cut to 200 characters. Raises ConversationNotFound, EmptyMessage."""
        title = " ".join(title.split())[:TITLE_LIMIT]
        if not title:
            raise EmptyMessage("A title needs at least one letter.")
        if not self._repository.rename(conversation_id, title):
            raise ConversationNotFound("This conversation does not exist any more.")

    def delete(self, conversation_id: str) -> None:
        """Stop what is being written in it, and delete it. Raises ConversationNotFound."""
        with self._lock:
            running = self._writing_in(conversation_id)
            if running is not None:
                self._stop(running)
            if not self._repository.delete(conversation_id):
                raise ConversationNotFound("This conversation does not exist any more.")

    def start(self, text: str, model: str | None = None, message_id: str | None = None) -> Message:
        """Begin a conversation with the user's message, and the answer to it, which is returned.

        A message whose id was given once is sent once: it is returned the next time. Raises EmptyMessage,
        MessageTooLong; then there is no conversation.
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
        """Save the user's message and begin the answer by `model` (None: the active one), which is returned.

        A message whose id was given once is sent once: it is returned the next time. Raises ConversationNotFound,
        ChatBusy, EmptyMessage, MessageTooLong.
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
        """Write another answer to the last message, beside those that are there; one without a word is replaced.

        A last message of the user's that has no answer gets one. Raises MessageNotFound, ChatBusy, NotTheLast.
        """
        with self._lock:
            conversation = self._idle(self.message(message_id).conversation_id)
            *before, last = conversation.messages
            if message_id not in (last.id, *last.versions):
                raise NotTheLast("Only the last answer can be written anew.")
            answer = self._message(conversation.id, "assistant", "", model)
            if last.role == "user":
                prompt = prompt_of(conversation)
                return self._begin(answer, prompt, model, lambda: self._repository.append(answer))
            empty = not (last.content or last.thinking)
            kept = [old for old in last.versions or (last.id,) if not (empty and old == last.id)]
            answer = replace(answer, versions=(*kept, answer.id) if kept else ())
            save = partial(self._repository.add_version, answer, last.id, instead=empty)
            told = prompt_of(replace(conversation, messages=tuple(before))).messages
            return self._begin(answer, Prompt(told, conversation.latest_answer), model, save)

    def show(self, message_id: str) -> Message:
        """Show this one of the answers to a message, and go on from it. Raises MessageNotFound, ChatBusy."""
        with self._lock:
            message = self.message(message_id)
            running = self._writing_in(message.conversation_id)
            if running is not None and message_id in running.answer.message.versions:
                raise ChatBusy("Another answer is being written here. Stop it or wait until it is there.")
            if not self._repository.show(message_id):
                raise MessageNotFound("This message does not exist any more.")
            return message

    def stop(self, message_id: str) -> Message:
        """End an answer with what came so far; nothing happens to one that is final. Raises MessageNotFound."""
        running = self._running.get(message_id)
        if running is not None:
            return self._stop(running)
        message = self.message(message_id)
        if message.state == "interrupted":  # its row may still say that it is being written
            self._saver.put(message)
        return message

    def message(self, message_id: str) -> Message:
        """One message as it is now. Raises MessageNotFound."""
        running = self._running.get(message_id)
        if running is not None:
            return running.answer.message
        stored = self._repository.message(message_id)
        if stored is None:
            raise MessageNotFound("This message does not exist any more.")
        return self._newest(stored)

    def follow(self, message_id: str) -> Iterator[Message | None]:
        """A message now, then each time it grew, until it is final; None every 10 s without a change.

        Raises MessageNotFound at once.
        """
        running = self._running.get(message_id)
        return iter((self.message(message_id),)) if running is None else running.answer.follow()

    def close(self) -> None:
        """Stop every answer, and give those who write them a few seconds to leave."""
        deadline = time.monotonic() + CLOSE_SECONDS
        all_running = list(self._running.values())
        for running in all_running:
            running.answer.stop()
        for running in all_running:
            running.thread.join(max(0.0, deadline - time.monotonic()))
        self._saver.close(max(0.0, deadline - time.monotonic()))

    def _idle(self, conversation_id: str) -> Conversation:
        """The conversation, provided that nothing is being written in it."""
        if self._writing_in(conversation_id) is not None:
            raise ChatBusy("An answer is being written in this conversation. Stop it or wait until it is there.")
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
        """A message as it is now, given what the database had of it.

        A row that says `streaming` and that nobody writes, such as one from a restored copy, counts as interrupted.
        """
        running = self._running.get(stored.id)
        live = running.answer.message if running is not None else self._saver.unsaved(stored.id)
        if live is not None:
            return replace(live, versions=stored.versions)
        if stored.final:
            return stored
        again = self._repository.message(stored.id)  # it may have ended since the row was read
        if again is not None and again.final:
            return again
        return replace(stored, state="interrupted", finished_at=stored.created_at)

    def _sent(self, message_id: str | None) -> Message | None:
        return None if message_id is None else self._repository.message(message_id)

    def _exchange(
        self, conversation_id: str, text: str, model: str | None, message_id: str | None
    ) -> tuple[Message, Message]:
        """A question, and the answer that is about to grow."""
        question = self._message(conversation_id, "user", text)
        question = question if message_id is None else replace(question, id=message_id)
        return question, self._message(conversation_id, "assistant", "", model)

    def _message(self, conversation_id: str, role: Role, text: str, model: str | None = None) -> Message:
        """A new message: a final one, or an assistant's that is about to grow."""
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
        """Have the answer `message` saved, then written in a thread of its own."""
        answer = Answer(message, self._saver.put, self._clock)
        thread = threading.Thread(
            target=self._write, args=(answer, prompt, model), name=f"answer-{message.id[:8]}", daemon=True
        )
        self._running[message.id] = _Running(answer, thread)  # first: a row without a writer counts as interrupted
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
    """What a user typed, as it is sent. Raises EmptyMessage, MessageTooLong."""
    text = text.replace("\r\n", "\n").strip()  # a form sends each line break as two characters
    if not text:
        raise EmptyMessage("Write something first.")
    if len(text) > MESSAGE_LIMIT:
        raise MessageTooLong(
            f"This message has {len(text):,} characters; {MESSAGE_LIMIT:,} is the limit. Send it in parts."
        )
    return text


def prompt_of(conversation: Conversation) -> Prompt:
    """What a model is told of a conversation: everything that has words, in order."""
    told = tuple(message for message in conversation.messages if message.final and message.content)
    return Prompt(told, conversation.latest_answer)


def title_of(text: str) -> str:
    """A title from a first message: its beginning, cut at a word where there is one."""
    line = " ".join(text.split())
    if len(line) <= TITLE_LENGTH:
        return line
    beginning, _, rest = line[: TITLE_LENGTH + 1].rpartition(" ")
    return f"{beginning or rest[:TITLE_LENGTH]}…"
