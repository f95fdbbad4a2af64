"""Server-sent events of an answer while it is written: what is new, and the whole message at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flask import render_template

from blueprints.markdown import FORMAT_LIMIT, PLAIN_EXCERPT
from blueprints.markdown.incremental import AnswerHtml, incremental_html
from blueprints.web import SSE_HEARTBEAT, sse_event
from services.chats import Chats, Message, MessageNotFound


def answer_html(message: Message, chats: Chats) -> AnswerHtml:
    """Return the current HTML of an answer under way."""
    if len(message.content) > FORMAT_LIMIT:
        excerpt = render_template("fragments/excerpt.html", message=message)
        return AnswerHtml((excerpt,), render_template("fragments/too_long.html", message=message))
    return incremental_html[_key(message)].update(lambda: _newest(message, chats).content[:FORMAT_LIMIT])


def _key(message: Message) -> str:
    """Return the key of a text that only grows. It changes when text turns out to be thought and leaves the answer."""
    return f"{message.id} after thoughts" if message.thinking else message.id


def _newest(message: Message, chats: Chats) -> Message:
    try:
        return chats.message(message.id)
    except MessageNotFound:
        return message  # deleted meanwhile


def events(chats: Chats, message_id: str) -> Iterator[bytes]:
    """Yield `text` events while an answer grows, then `final` with the whole message.

    The first `text` event has everything so far, later ones the newly finished blocks; each has the unfinished tail.
    """
    sent = _Sent()
    for number, now in enumerate(chats.follow(message_id), 1):
        if now is None:
            yield SSE_HEARTBEAT
        elif now.final:
            incremental_html.complete(_key(now), now.content)
            yield sse_event("final", render_template("fragments/message.html", message=now), number)
        else:
            yield sse_event("text", sent.what_is_new(now, answer_html(now, chats)), number)


@dataclass
class _Sent:
    """What one reader has been sent.

    The finished blocks, the number of characters of the thoughts, and whether the thoughts have ended.
    """

    blocks: tuple[str, ...] | None = None
    thoughts: int = 0
    thoughts_ended: bool = False

    def what_is_new(self, message: Message, look: AnswerHtml) -> str:
        """Return the HTML that brings the reader up to date, and note it as sent."""
        whole = self.blocks is None or look.finished[: len(self.blocks)] != self.blocks
        thoughts = message.thinking[:PLAIN_EXCERPT]
        html = render_template(
            "fragments/message_look.html",
            message=message,
            all_thoughts=not self.thoughts and bool(thoughts),
            new_thoughts=thoughts[self.thoughts :] if self.thoughts else "",
            thoughts_end=self.thoughts and message.content and not self.thoughts_ended,
            whole=whole,
            new=look.finished if whole or self.blocks is None else look.finished[len(self.blocks) :],
            tail=look.tail,
        )
        self.blocks, self.thoughts, self.thoughts_ended = look.finished, len(thoughts), bool(message.content)
        return html
