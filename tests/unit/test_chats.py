"""Conversations and answers: what is stored, what is refused, and what every reader sees."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from services import answers
from services.answers import Delta, Prompt
from services.cancellation import CancelToken
from services.chats import (
    ChatBusy,
    Chats,
    Conversation,
    ConversationNotFound,
    EmptyMessage,
    GenerationError,
    Message,
    MessageNotFound,
    MessageTooLong,
    NotTheLast,
    prompt_of,
    title_of,
)
from services.store import message_saver
from services.store.errors import StoreLocked
from services.store.records import new_id
from services.store.repository import ConversationRepository, Store, open_store
from tests.support.console import wait_until
from tests.support.faults import locked_database

WAIT = 5.0


class FakeStream:
    """An answer whose pieces the test sends one by one; `taken` counts those that were consumed."""

    told_from = 0
    context_full = False

    def __init__(self, model: str, prompt: Prompt, token: CancelToken) -> None:
        self.model = model
        self.prompt = prompt
        self.messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        self.left = threading.Event()
        self.cancelled = False
        self._pieces: queue.Queue[str | Delta | Exception | None] = queue.Queue()
        token.on_cancel(self._cancel)

    def say(self, *pieces: str | Delta) -> FakeStream:
        for piece in pieces:
            self._pieces.put(piece)
        return self

    def end(self) -> None:
        self._pieces.put(None)

    def fail(self, error: Exception) -> None:
        self._pieces.put(error)

    def _cancel(self) -> None:
        self.cancelled = True
        self.end()

    def __iter__(self) -> Iterator[Delta]:
        while (piece := self._pieces.get(timeout=WAIT)) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece if isinstance(piece, Delta) else Delta(piece)


class FakeGenerator:
    """Gives each request to the test as a stream. While `admit` is cleared requests wait, as for a loading model."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.told_from = 0
        self.admit = threading.Event()
        self.admit.set()
        self.asked = threading.Event()
        self._streams: queue.Queue[FakeStream] = queue.Queue()

    @contextmanager
    def stream_chat(self, model: str | None, prompt: Prompt, token: CancelToken) -> Iterator[FakeStream]:
        with token.cancelling(self.admit.set):
            self.asked.set()
            assert self.admit.wait(WAIT)
        if self.refusal:
            raise self.refusal
        stream = FakeStream(model or "active-model", prompt, token)
        stream.told_from = self.told_from
        self._streams.put(stream)
        try:
            yield stream
        finally:
            stream.left.set()

    def next(self, patience: float = WAIT) -> FakeStream:
        return self._streams.get(timeout=patience)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "switchyard.db"


@pytest.fixture
def patience() -> float:
    """How long the database waits for a lock: long enough on a busy machine."""
    return WAIT


impatient = pytest.mark.parametrize("patience", [0.01])
"""For tests in which it stays locked: it waits only for a moment."""


@pytest.fixture
def store(path: Path, patience: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A database; failed saves are retried soon."""
    monkeypatch.setattr(message_saver, "FIRST_PAUSE_SECONDS", 0.01)
    store = open_store(path, lock_timeout=patience)
    yield store
    store.close()


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def chats(store: Store, generator: FakeGenerator) -> Iterator[Chats]:
    chats = Chats(ConversationRepository(store), generator)
    yield chats
    generator.admit.set()
    chats.close()


def new_conversation(store: Store, title: str = "A talk") -> Conversation:
    """An empty conversation."""
    conversation = Conversation(new_id(), title, 1.0, 1.0)
    ConversationRepository(store).add(conversation)
    return conversation


@pytest.fixture
def conversation(store: Store) -> Conversation:
    return new_conversation(store)


def wait_for_end(chats: Chats, message_id: str) -> Message:
    """The message once it is complete."""
    *_, last = (m for m in chats.follow(message_id) if m is not None)
    return last


def wait_for_content(chats: Chats, message_id: str, content: str) -> Message:
    """The message once its content is `content`."""
    return next(m for m in chats.follow(message_id) if m is not None and m.content == content)


def is_saved(store: Store, message: Message) -> bool:
    """Whether the database has this state of a message, or will have soon."""
    wait_until(lambda: ConversationRepository(store).message(message.id) == message, "a message to be saved")
    return True


def answer(chats: Chats, generator: FakeGenerator, conversation: Conversation, text: str, *pieces: str) -> Message:
    """A whole exchange: question and answer."""
    sent = chats.send(conversation.id, text)
    generator.next().say(*pieces).end()
    return wait_for_end(chats, sent.id)


def test_an_answer_is_written_and_kept(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store
) -> None:
    """The question is saved; the answer grows to its end, names its model, and is in the database."""
    sent = chats.send(conversation.id, "  Hello?  ")
    assert (sent.role, sent.state, sent.content, sent.final) == ("assistant", "streaming", "", False)
    generator.next().say("Good ", "day", ".").end()
    done = wait_for_end(chats, sent.id)
    assert (done.content, done.state, done.model, done.tokens) == ("Good day.", "complete", "active-model", 3)
    assert done.seconds is not None
    assert done.finished_at is not None
    assert is_saved(store, done)
    stored = ConversationRepository(store).get(conversation.id)
    assert stored is not None
    assert [(m.role, m.content, m.state) for m in stored.messages] == [
        ("user", "Hello?", "complete"),
        ("assistant", "Good day.", "complete"),
    ]
    assert chats.get(conversation.id) == stored


def test_the_chosen_model_is_asked(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """The model that the user chose is passed to the generator."""
    chats.send(conversation.id, "Hi", model="tiny")
    assert generator.next().model == "tiny"


def test_the_first_message_names_the_conversation(chats: Chats, generator: FakeGenerator) -> None:
    """The title is the beginning of the first message, unless the user sets another; later messages don't change it."""
    begun = chats.start("Tell me about trains")
    generator.next().say("ok").end()
    wait_for_end(chats, begun.id)
    conversation = chats.get(begun.conversation_id)
    assert conversation.title == "Tell me about trains"
    answer(chats, generator, conversation, "And planes", "ok")
    assert chats.get(conversation.id).title == "Tell me about trains"
    chats.rename(conversation.id, "  My \n chat ")
    answer(chats, generator, conversation, "Something else", "ok")
    assert [c.title for c in chats.conversations()] == ["My chat"]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("Short", "Short"),
        ("two\n  lines", "two lines"),
        ("a" * 48, "a" * 48),
        ("a" * 60, "a" * 48 + "…"),
        ("word " * 20, "word word word word word word word word word…"),
        ("x" * 47 + " next words", "x" * 47 + "…"),
    ],
)
def test_titles_are_cut_at_a_word(text: str, title: str) -> None:
    """A long title ends with a whole word and an ellipsis; a single long word is cut."""
    assert title_of(text) == title


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_message_is_refused(text: str, chats: Chats, conversation: Conversation) -> None:
    """An empty message is refused and nothing is stored."""
    with pytest.raises(EmptyMessage):
        chats.send(conversation.id, text)
    assert chats.get(conversation.id).messages == ()


def test_the_limit_of_a_message(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """32,000 characters are accepted, one more is refused with a message."""
    with pytest.raises(MessageTooLong, match="32,001 characters; 32,000 is the limit"):
        chats.send(conversation.id, "x" * 32_001)
    answer(chats, generator, conversation, "x" * 32_000, "ok")


def test_unknown_ids_are_refused(chats: Chats) -> None:
    """Every call with an unknown conversation or message id gets a clear error."""
    for call in (chats.get, chats.delete, lambda key: chats.rename(key, "x"), lambda key: chats.send(key, "x")):
        with pytest.raises(ConversationNotFound, match="does not exist any more"):
            call("nothing")
    for ask in (chats.message, chats.stop, chats.retry, chats.follow):
        with pytest.raises(MessageNotFound, match="does not exist any more"):
            ask("nothing")


def test_one_answer_at_a_time(chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store) -> None:
    """During an answer its conversation accepts no other message; other conversations do."""
    sent = chats.send(conversation.id, "One")
    stream = generator.next()
    with pytest.raises(ChatBusy):
        chats.send(conversation.id, "Two")
    with pytest.raises(ChatBusy):
        chats.retry(sent.id)
    answer(chats, generator, new_conversation(store), "Elsewhere", "ok")
    stream.end()
    wait_for_end(chats, sent.id)
    answer(chats, generator, conversation, "Two", "ok")


def test_two_sends_at_once_make_one_answer(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """Of eight threads that send at the same time one succeeds, the others are refused as busy."""
    barrier, results = threading.Barrier(8), queue.Queue[str]()

    def send() -> None:
        barrier.wait(WAIT)
        try:
            results.put(chats.send(conversation.id, "Me").state)
        except ChatBusy:
            results.put("busy")

    threads = [threading.Thread(target=send, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(results.get_nowait() for _ in range(8)) == ["busy"] * 7 + ["streaming"]
    assert len(chats.get(conversation.id).messages) == 2
    generator.next().end()


def test_stopping_keeps_the_text_so_far(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """A stopped answer keeps its text, the engine is told to stop, and nothing is added afterwards."""
    sent = chats.send(conversation.id, "Count")
    stream = generator.next().say("one ", "two")
    wait_for_content(chats, sent.id, "one two")
    stopped = chats.stop(sent.id)
    assert (stopped.state, stopped.content, stopped.error) == ("stopped", "one two", None)
    assert stream.cancelled
    stream.say(" three").end()
    assert stream.left.wait(WAIT)
    assert chats.message(sent.id) == stopped
    assert chats.stop(sent.id) == stopped


def test_stopping_before_the_model_is_loaded(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """An answer that waits for its model stops at once: its generator is cancelled and the engine never called."""
    generator.admit.clear()
    sent = chats.send(conversation.id, "Hi")
    assert generator.asked.wait(WAIT)
    assert chats.stop(sent.id).state == "stopped"
    assert generator.admit.wait(WAIT)
    chats.close()
    assert chats.message(sent.id).state == "stopped"
    with pytest.raises(queue.Empty):
        generator.next(0)


def test_a_refusal_is_shown(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """The generator's error message is stored in the failed answer, and the chat can continue."""
    generator.refusal = GenerationError("No model is loaded. Load one on the Models page.")
    failed = wait_for_end(chats, chats.send(conversation.id, "Hi").id)
    assert (failed.state, failed.error) == ("failed", "No model is loaded. Load one on the Models page.")
    assert failed.content == ""
    generator.refusal = None
    assert answer(chats, generator, conversation, "Again", "ok").state == "complete"


def test_a_failing_engine_keeps_the_text_so_far(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """An answer whose engine crashes in the middle is marked as failed and keeps its text."""
    sent = chats.send(conversation.id, "Hi")
    generator.next().say("Half an ans").fail(GenerationError("The engine went away."))
    failed = wait_for_end(chats, sent.id)
    assert (failed.state, failed.content, failed.error) == ("failed", "Half an ans", "The engine went away.")


def test_a_bug_does_not_leave_an_answer_hanging(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """After any exception the answer ends, with a message without a stack trace."""
    sent = chats.send(conversation.id, "Hi")
    generator.next().fail(KeyError("secret"))
    failed = wait_for_end(chats, sent.id)
    assert failed.state == "failed"
    assert failed.error == "Switchyard failed to pass the answer on (KeyError); its log has the details."


def test_retry_keeps_the_earlier_answer(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store
) -> None:
    """Both answers are kept; the new one gets the history before it, and is shown."""
    answer(chats, generator, conversation, "One", "first")
    old = answer(chats, generator, conversation, "Two", "bad")
    new = chats.retry(old.id)
    stream = generator.next().say("good")
    stream.end()
    assert [m["content"] for m in stream.messages] == ["One", "first", "Two"]
    assert wait_for_end(chats, new.id).versions == (old.id, new.id)
    assert [m.content for m in chats.get(conversation.id).messages] == ["One", "first", "Two", "good"]
    assert chats.message(old.id) == replace(old, versions=(old.id, new.id))
    again = Chats(ConversationRepository(store), generator)
    assert again.get(conversation.id).messages[-1].versions == (old.id, new.id)
    again.close()


def test_the_conversation_continues_from_the_shown_answer(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """The model gets the versions that are shown, also after another version was chosen."""
    old = answer(chats, generator, conversation, "One", "old")
    new = chats.retry(old.id)
    generator.next().say("new").end()
    wait_for_end(chats, new.id)
    assert chats.show(old.id).content == "old"
    sent = chats.send(conversation.id, "Two")
    stream = generator.next()
    stream.end()
    assert [m["content"] for m in stream.messages] == ["One", "old", "Two"]
    wait_for_end(chats, sent.id)
    chats.show(new.id)
    assert [m.content for m in chats.get(conversation.id).messages] == ["One", "new", "Two", ""]


def test_an_answer_without_text_is_replaced(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """A failed answer without text is replaced; earlier answers stay."""
    good = answer(chats, generator, conversation, "One", "good")
    generator.refusal = GenerationError("no")
    failed = wait_for_end(chats, chats.retry(good.id).id)
    generator.refusal = None
    again = chats.retry(failed.id)
    generator.next().say("better").end()
    assert wait_for_end(chats, again.id).versions == (good.id, again.id)
    with pytest.raises(MessageNotFound):
        chats.message(failed.id)
    only = chats.start("Hi")
    generator.next().end()
    wait_for_end(chats, only.id)
    last = chats.retry(only.id)
    generator.next().say("ok").end()
    assert wait_for_end(chats, last.id).versions == ()


def test_no_other_version_is_shown_during_an_answer(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """Otherwise the composer would accept a message that is then refused; other answers can be shown meanwhile."""
    first = answer(chats, generator, conversation, "One", "1")
    second = chats.retry(first.id)
    generator.next().say("2").end()
    wait_for_end(chats, second.id)
    old = answer(chats, generator, conversation, "Two", "old")
    new = chats.retry(old.id)
    stream = generator.next()
    for message_id in (old.id, new.id):
        with pytest.raises(ChatBusy):
            chats.show(message_id)
    chats.show(first.id)
    stream.end()
    wait_for_end(chats, new.id)
    with pytest.raises(MessageNotFound):
        chats.show("nothing")


def test_only_the_last_answer_can_be_retried(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """Retrying an earlier answer is refused."""
    first = answer(chats, generator, conversation, "One", "first")
    answer(chats, generator, conversation, "Two", "second")
    with pytest.raises(NotTheLast):
        chats.retry(first.id)


def test_a_question_without_an_answer_can_be_retried(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store
) -> None:
    """If the process died between question and answer, Retry answers the question without storing it again."""
    question = Message("q" * 32, conversation.id, "user", "One", None, "complete", None, 1.0, 1.0, None, None)
    ConversationRepository(store).append(question)
    new = chats.retry(question.id)
    generator.next().say("here").end()
    wait_for_end(chats, new.id)
    assert [m.content for m in chats.get(conversation.id).messages] == ["One", "here"]


def test_the_history_sent_to_the_model(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """All messages with text, in order; a failed answer without text is left out."""
    answer(chats, generator, conversation, "One", "1")
    generator.refusal = GenerationError("no")
    wait_for_end(chats, chats.send(conversation.id, "Two").id)
    generator.refusal = None
    chats.send(conversation.id, "Three")
    stream = generator.next()
    stream.end()
    assert stream.messages == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two"},
        {"role": "user", "content": "Three"},
    ]


def test_thoughts_are_stored_apart_and_never_sent_again(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store
) -> None:
    """They are a sign of life, are saved with their duration, and are not part of the history."""
    sent = chats.send(conversation.id, "One")
    stream = generator.next().say(Delta("Let me ", thought=True), Delta("see", thought=True))
    thinking = next(m for m in chats.follow(sent.id) if m is not None and m.thinking == "Let me see")
    assert (thinking.content, thinking.tokens, thinking.final) == ("", 2, False)
    stream.say("It is ", "one.").end()
    done = wait_for_end(chats, sent.id)
    assert (done.thinking, done.content, done.tokens) == ("Let me see", "It is one.", 4)
    assert done.thinking_seconds is not None
    assert done.seconds is not None
    assert done.thinking_seconds <= done.seconds
    assert is_saved(store, done)
    chats.send(conversation.id, "Two")
    stream = generator.next()
    stream.end()
    assert [m["content"] for m in stream.messages] == ["One", "It is one.", "Two"]


def test_a_closing_tag_makes_everything_before_it_a_thought(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """Some models' answers only have the closing tag."""
    sent = chats.send(conversation.id, "One")
    generator.next().say("Let me see\n", Delta("", thought=True, all_before=True), "It is one.").end()
    done = wait_for_end(chats, sent.id)
    assert (done.thinking, done.content) == ("Let me see", "It is one.")


def test_an_answer_with_thoughts_only_is_kept_as_a_version(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """An answer with thoughts only is kept on Retry, too."""
    sent = chats.send(conversation.id, "One")
    generator.next().say(Delta("Hm", thought=True))
    next(m for m in chats.follow(sent.id) if m is not None and m.thinking)
    chats.stop(sent.id)
    again = chats.retry(sent.id)
    generator.next().say("ok").end()
    assert wait_for_end(chats, again.id).versions == (sent.id, again.id)


def test_dropped_history_is_stored(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store
) -> None:
    """The first message that was sent, and whether the answer filled the context, apply to the next answer as well."""
    answer(chats, generator, conversation, "One", "1")
    generator.told_from = 2
    sent = chats.send(conversation.id, "Two")
    stream = generator.next()
    stream.context_full = True
    stream.say("2").end()
    generator.told_from = 0
    done = wait_for_end(chats, sent.id)
    assert (done.told_from, done.context_full) == (stream.prompt.messages[2].id, True)
    assert stream.prompt.messages[2].content == "Two"
    assert is_saved(store, done)
    again = chats.retry(done.id)
    stream = generator.next()
    stream.end()
    assert stream.prompt.last_answer == done
    assert [m.content for m in stream.prompt.messages] == ["One", "1", "Two"]
    wait_for_end(chats, again.id)
    chats.show(done.id)
    chats.send(conversation.id, "Three")
    stream = generator.next()
    stream.end()
    assert stream.prompt.last_answer is not None
    assert stream.prompt.last_answer.id == done.id


def test_a_growing_message_is_not_part_of_the_history() -> None:
    """Only completed messages are sent to a model."""
    growing = Message("i", "c", "assistant", "half", None, "streaming", None, 0.0, None, 1, 0.0)
    assert prompt_of(Conversation("c", "A", 0.0, 0.0, (growing,))).messages == ()


def test_two_readers_see_the_same(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """Two readers that start at different times both see the text grow and the same end."""
    sent = chats.send(conversation.id, "Hi")
    stream = generator.next()
    seen: list[list[Message]] = [[], []]

    def follow(reader: int) -> None:
        seen[reader].extend(m for m in chats.follow(sent.id) if m is not None)

    readers = [threading.Thread(target=follow, args=(n,), daemon=True) for n in range(2)]
    readers[0].start()
    stream.say("a", "b")
    wait_for_content(chats, sent.id, "ab")
    readers[1].start()
    stream.say("c").end()
    for reader in readers:
        reader.join(WAIT)
    assert seen[0][-1] == seen[1][-1] == chats.message(sent.id)
    assert seen[0][-1].content == "abc"
    for views in seen:
        assert all(later.content.startswith(earlier.content) for earlier, later in pairwise(views))


def test_following_a_finished_answer_gives_it_once(
    chats: Chats, generator: FakeGenerator, conversation: Conversation
) -> None:
    """A late reader gets the final message and the end."""
    done = answer(chats, generator, conversation, "Hi", "ok")
    assert list(chats.follow(done.id)) == [done]


def test_many_pieces_make_few_updates(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """A reader isn't woken for each of a thousand pieces, but misses no text."""
    sent = chats.send(conversation.id, "Hi")
    stream = generator.next()
    updates = chats.follow(sent.id)
    next(updates)
    stream.say(*["x"] * 1000).end()
    views = [m for m in updates if m is not None]
    assert views[-1].content == "x" * 1000
    assert len(views) < 100


def test_a_fast_engine_does_not_block_the_event_loop(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading available pieces never yields: an answer of 5 MB blocked all others for over a second."""
    taken: list[float] = []
    monkeypatch.setattr("services.yielding.SLICE_SECONDS", 0.0)
    monkeypatch.setattr("services.yielding.time", SimpleNamespace(monotonic=time.monotonic, sleep=taken.append))
    answer(chats, generator, conversation, "Hi", *["x"] * 100)
    assert len(taken) == 100
    assert min(taken) > 0


def test_a_silent_answer_gives_heartbeats(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without new pieces a reader gets None now and then, so that a disconnected client is noticed."""
    monkeypatch.setattr(answers, "HEARTBEAT_SECONDS", 0.001)
    monkeypatch.setattr(answers, "FOLLOW_SECONDS", 0.001)
    sent = chats.send(conversation.id, "Hi")
    stream = generator.next()
    updates = chats.follow(sent.id)
    next(updates)
    assert next(m is None for m in updates if m is None or m.content)
    stream.end()
    assert [m for m in updates if m is not None][-1].state == "complete"


def test_a_page_includes_the_growing_answer(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """A conversation read during an answer includes its text so far, saved or not."""
    sent = chats.send(conversation.id, "Hi")
    stream = generator.next().say("so far")
    wait_for_content(chats, sent.id, "so far")
    live = chats.get(conversation.id).messages[-1]
    assert (live.id, live.content, live.state) == (sent.id, "so far", "streaming")
    stream.end()


def test_answers_are_saved_while_they_grow(
    chats: Chats,
    generator: FakeGenerator,
    conversation: Conversation,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The text so far is in the database before the answer is complete."""
    monkeypatch.setattr(answers, "SAVE_SECONDS", 0.0)
    sent = chats.send(conversation.id, "Hi")
    stream = generator.next().say("half")
    so_far = wait_for_content(chats, sent.id, "half")
    assert so_far.state == "streaming"
    assert is_saved(store, so_far)
    stream.end()


@impatient
def test_a_locked_database_delays_no_answer(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store, path: Path
) -> None:
    """It continues and ends normally, other answers too, and everything is saved once the database works again."""
    one, other = chats.send(conversation.id, "One"), chats.send(new_conversation(store).id, "Two")
    streams = {stream.messages[0]["content"]: stream for stream in (generator.next(), generator.next())}
    with locked_database(path):
        streams["One"].say("A whole ", "answer.").end()
        streams["Two"].say("Half an")
        done = wait_for_end(chats, one.id)
        wait_for_content(chats, other.id, "Half an")
        cut = chats.stop(other.id)
        assert (done.state, done.content, done.error) == ("complete", "A whole answer.", None)
        assert (cut.state, cut.content) == ("stopped", "Half an")
        assert chats.get(conversation.id).messages[-1] == chats.message(one.id) == done
        assert list(chats.follow(one.id)) == [done]
        stored = ConversationRepository(store).message(one.id)
        assert stored is not None
        assert stored.state == "streaming"
    assert is_saved(store, done)
    assert is_saved(store, cut)
    assert chats.get(conversation.id).messages[-1] == done


@impatient
def test_a_failed_save_is_retried_when_the_app_stops(
    chats: Chats,
    generator: FakeGenerator,
    conversation: Conversation,
    store: Store,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the app stops, the last retry doesn't wait for the interval between retries."""
    monkeypatch.setattr(message_saver, "FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(message_saver, "LONGEST_PAUSE_SECONDS", 60.0)
    sent = chats.send(conversation.id, "One")
    with capture_logs() as logs, locked_database(path):
        generator.next().say("words").end()
        done = wait_for_end(chats, sent.id)
        wait_until(lambda: any("could not be saved" in line["event"] for line in logs), "a save to fail")
    chats.close()
    assert ConversationRepository(store).message(sent.id) == done


def test_a_failing_save_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is retried until it succeeds, its newest state last."""
    monkeypatch.setattr(message_saver, "FIRST_PAUSE_SECONDS", 0.001)
    written: queue.Queue[Message] = queue.Queue()
    refused = threading.Semaphore(3)

    def write(message: Message) -> None:
        if message.id == "bad" and refused.acquire(blocking=False):
            raise ValueError("no")
        written.put(message)

    saver = message_saver.MessageSaver(write)
    bad, good = (
        Message(name, "c", "assistant", "x", None, "streaming", None, 0.0, None, 1, 0.0) for name in ("bad", "good")
    )
    saver.put(bad)
    saver.put(good)
    newer = replace(bad, content="xyz")
    saver.put(newer)
    assert {written.get(timeout=WAIT).id, written.get(timeout=WAIT).id} == {"bad", "good"}
    wait_until(lambda: saver.unsaved("bad") is None, "the newest state to be saved")
    saver.close()
    assert not refused.acquire(blocking=False)


@impatient
def test_a_message_that_can_not_be_saved_is_not_sent(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, path: Path
) -> None:
    """Neither half of the exchange is stored, no engine is called, and the message can be sent again."""
    with locked_database(path):
        for send in (lambda: chats.send(conversation.id, "Hello"), lambda: chats.start("Hello")):
            with pytest.raises(StoreLocked):
                send()
    assert not generator.asked.is_set()
    assert [c.id for c in chats.conversations()] == [conversation.id]
    assert chats.get(conversation.id).messages == ()
    assert answer(chats, generator, conversation, "Hello", "ok").state == "complete"


def test_a_streaming_row_without_a_writer_is_interrupted(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store
) -> None:
    """For example one from a restored backup: Stop repairs it, and it can be retried."""
    row = Message("b" * 32, conversation.id, "assistant", "half", "m", "streaming", None, 1.0, None, 1, 0.0)
    ConversationRepository(store).append(row)
    shown = chats.message(row.id)
    assert (shown.state, shown.content) == ("interrupted", "half")
    assert list(chats.follow(row.id)) == [shown]
    assert chats.get(conversation.id).messages == (shown,)
    assert chats.stop(row.id) == shown
    assert is_saved(store, shown)
    again = chats.retry(row.id)
    generator.next().say("whole").end()
    assert wait_for_end(chats, again.id).content == "whole"


def test_a_conversation_begins_with_its_first_message(chats: Chats, generator: FakeGenerator) -> None:
    """The conversation gets its title from the message; a refused message leaves no conversation."""
    for text in ("", "x" * 32_001):
        with pytest.raises((EmptyMessage, MessageTooLong)):
            chats.start(text)
    assert chats.conversations() == []
    sent = chats.start("Tell me\r\nabout trains")
    generator.next().say("ok").end()
    wait_for_end(chats, sent.id)
    begun = chats.get(sent.conversation_id)
    assert begun.title == "Tell me about trains"
    assert [m.content for m in begun.messages] == ["Tell me\nabout trains", "ok"]


def test_an_error_with_a_lone_surrogate_can_be_stored(
    chats: Chats, generator: FakeGenerator, conversation: Conversation, store: Store
) -> None:
    """An engine's error text may contain a lone surrogate, which SQLite and the page must handle."""
    generator.refusal = GenerationError("bad \ud83d token")
    failed = wait_for_end(chats, chats.send(conversation.id, "Hi").id)
    assert failed.error == "bad \ufffd token"
    assert is_saved(store, failed)


def test_a_restart_marks_unfinished_answers(store: Store, generator: FakeGenerator) -> None:
    """After a crash an unfinished answer is interrupted, keeps its saved text, and can be retried."""
    conversation = new_conversation(store)
    repository = ConversationRepository(store)
    half = Message("a" * 32, conversation.id, "assistant", "half", "m", "streaming", None, 1.0, None, 1, 0.0)
    repository.append(half)
    reborn = Chats(repository, generator, clock=lambda: 99.0)
    found = reborn.message(half.id)
    assert (found.state, found.content, found.finished_at) == ("interrupted", "half", 99.0)
    assert list(reborn.follow(half.id)) == [found]
    again = reborn.retry(half.id)
    generator.next().say("whole").end()
    assert wait_for_end(reborn, again.id).content == "whole"


def test_deleting_stops_the_answer(chats: Chats, generator: FakeGenerator, conversation: Conversation) -> None:
    """A conversation deleted during an answer is gone, and the engine is told to stop."""
    sent = chats.send(conversation.id, "Hi")
    stream = generator.next().say("some")
    wait_for_content(chats, sent.id, "some")
    chats.delete(conversation.id)
    assert stream.left.wait(WAIT)
    assert chats.conversations() == []
    with pytest.raises(MessageNotFound):
        chats.message(sent.id)


def test_closing_stops_every_answer(chats: Chats, generator: FakeGenerator, store: Store) -> None:
    """Every answer is stopped and saved with its text so far, and its thread ends."""
    sent = [chats.start("Hi") for _ in range(3)]
    streams = [generator.next().say("words") for _ in sent]
    for message in sent:
        wait_for_content(chats, message.id, "words")
    chats.close()
    stored = [ConversationRepository(store).message(message.id) for message in sent]
    assert [(m.state, m.content) for m in stored if m] == [("stopped", "words")] * 3
    assert all(stream.left.is_set() for stream in streams)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("answer-")]


@pytest.mark.parametrize(
    ("tokens", "seconds", "pace"), [(None, None, None), (1, 0.0, None), (11, 2.0, 5.0), (0, None, None)]
)
def test_the_speed_is_measured_between_tokens(tokens: int | None, seconds: float | None, pace: float | None) -> None:
    """Ten intervals in two seconds are five tokens a second; one token has no speed."""
    message = Message("i", "c", "assistant", "x", "m", "complete", None, 0.0, 1.0, tokens, seconds)
    assert message.tokens_per_second == pace
