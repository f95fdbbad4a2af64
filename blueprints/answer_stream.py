"""An answer as its readers watch it grow: events that bring what is new, and the whole message at its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flask import render_template

from blueprints.markdown import FORMAT_LIMIT, PLAIN_EXCERPT
from blueprints.markdown.growing import Look, watched
from blueprints.web import SSE_HEARTBEAT, sse_event
from services.chats import Chats, Message, MessageNotFound


def look_at(message: Message, chats: Chats) -> Look:
    """The HTML of an answer under way, as it is now."""
    if len(message.content) > FORMAT_LIMIT:
        excerpt = render_template("fragments/excerpt.html", message=message)
        return Look((excerpt,), render_template("fragments/too_long.html", message=message))
    return watched[_key(message)].look(lambda: _newest(message, chats).content[:FORMAT_LIMIT])


def _key(message: Message) -> str:
    """Text only grows under the same key: what turns out to be thought leaves it, and is the first thought then."""
    return f"{message.id} after thoughts" if message.thinking else message.id


def _newest(message: Message, chats: Chats) -> Message:
    try:
        return chats.message(message.id)
    except MessageNotFound:
        return message  # deleted a moment ago


def events(chats: Chats, message_id: str) -> Iterator[bytes]:
    """`text` events while it grows: the first with all there is, the next with finished blocks that are new, and each
    with the rest; then `final` with the whole message."""
    sent = _Sent()
    for number, now in enumerate(chats.follow(message_id), 1):
        if now is None:
            yield SSE_HEARTBEAT
        elif now.final:
            watched.complete(_key(now), now.content)
            yield sse_event("final", render_template("fragments/message.html", message=now), number)
        else:
            yield sse_event("text", sent.what_is_new(now, look_at(now, chats)), number)


@dataclass
class _Sent:
    """What one reader of an answer has been sent: the finished blocks, how many characters of the thoughts, and
    whether these are over."""

    blocks: tuple[str, ...] | None = None
    thoughts: int = 0
    thoughts_ended: bool = False

    def what_is_new(self, message: Message, look: Look) -> str:
        """The HTML that brings the reader up to date, who then has been sent it."""
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
            rest=look.rest,
        )
        self.blocks, self.thoughts, self.thoughts_ended = look.finished, len(thoughts), bool(message.content)
        return html
