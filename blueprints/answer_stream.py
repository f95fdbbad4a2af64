"""An answer as its readers watch it grow: events that bring what is new, and the whole message at its end."""

from __future__ import annotations

from collections.abc import Iterator

from flask import render_template

from blueprints.markdown import FORMAT_LIMIT
from blueprints.markdown.growing import Look, watched
from blueprints.web import SSE_HEARTBEAT, sse_event
from services.chats import Chats, Message, MessageNotFound


def look_at(message: Message, chats: Chats) -> Look:
    """The HTML of an answer under way, as it is now."""
    if len(message.content) > FORMAT_LIMIT:
        excerpt = render_template("fragments/excerpt.html", message=message)
        return Look((excerpt,), render_template("fragments/too_long.html", message=message))
    return watched[message.id].look(lambda: _newest(message, chats).content)


def _newest(message: Message, chats: Chats) -> Message:
    try:
        return chats.message(message.id)
    except MessageNotFound:
        return message  # deleted a moment ago


def events(chats: Chats, message_id: str) -> Iterator[bytes]:
    """`text` events while it grows: the first with all there is, the next with finished blocks that are new, and each
    with the rest; then `final` with the whole message."""
    shown: tuple[str, ...] | None = None
    for number, now in enumerate(chats.follow(message_id), 1):
        if now is None:
            yield SSE_HEARTBEAT
        elif now.final:
            watched.complete(message_id, now.content)
            yield sse_event("final", render_template("fragments/message.html", message=now), number)
        else:
            look = look_at(now, chats)
            whole = shown is None or look.finished[: len(shown)] != shown
            new = look.finished if whole or shown is None else look.finished[len(shown) :]
            shown = look.finished
            html = render_template("fragments/message_look.html", message=now, whole=whole, new=new, rest=look.rest)
            yield sse_event("text", html, number)
