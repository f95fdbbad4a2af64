"""The Chat page: conversations, streamed messages, and the forms that write them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from flask import Blueprint, Response, render_template, stream_with_context, url_for
from htmx_flask import make_response, request

from blueprints import answer_stream
from blueprints.chat_extent import ConversationPage, Extent
from blueprints.live import Live
from blueprints.markdown.incremental import AnswerHtml
from blueprints.model_menu import drawn_menu, menu_lists, menu_pieces
from blueprints.pages import live_now, see_other
from blueprints.pieces import SINCE
from blueprints.web import ApiError, handles_errors_of, services, sse
from services.chats import Conversation, ConversationNotFound, Message, Outline
from services.store.records import MessageState, new_id

bp = Blueprint("chat", __name__)

SENT = "message-sent"
"""htmx event sent when a message is stored; only then does the page empty the composer."""
DELETED = "This conversation was deleted. Send the message again to begin a new chat with it."
NOTHING = "none"
"""Mark of a page without a conversation."""
_ID = re.compile("[0-9a-f]{32}")


@bp.app_template_filter()
def look(message: Message) -> AnswerHtml:
    """Return the HTML of an answer under way."""
    return answer_stream.answer_html(message, services().chats)


@bp.get("/")
def newest() -> str:
    """Show the conversation last written to, or an empty page."""
    latest = services().chats.conversations(limit=1)
    return _page(latest[0].id if latest else None)


@bp.get("/chats/new")
def new() -> str:
    """Show an empty page. The conversation is created with its first message."""
    return _page(None)


@bp.get("/chats/<conversation_id>")
def conversation(conversation_id: str) -> str:
    return _page(conversation_id)


@bp.post("/chats")
def create() -> Response:
    """Create a conversation with its first message."""
    begun = services().chats.start(_text(), message_id=_message_id()).conversation_id
    address = url_for("chat.conversation", conversation_id=begun)
    if not request.htmx:
        return see_other(address)
    answer: Response = make_response("", redirect=address, trigger=SENT)
    return answer


@bp.post("/chats/<conversation_id>/messages")
def send(conversation_id: str) -> Response:
    services().chats.send(conversation_id, _text(), message_id=_message_id())
    return _changed(conversation_id, trigger=SENT)


@handles_errors_of("chat.create", "chat.send")
def show_unsent(error: ApiError) -> Response:
    """Respond to a message that was not sent: the typed text stays in the composer, with the reason beside it."""
    wanted = (request.view_args or {}).get("conversation_id")
    deleted = error.code == "not_found"
    words = DELETED if deleted else error.message
    if request.htmx:
        html = render_template("fragments/unsent.html", unsent=words)
        answer: Response = make_response(
            html, retarget="#composer-error", reswap="innerHTML", trigger="refresh" if deleted else None
        )
        return answer
    if deleted:
        return Response(_page(None, deleted=wanted, typed=_text(), unsent=words))
    return Response(_page(wanted, typed=_text(), unsent=words))


@handles_errors_of("chat.conversation")
def show_deleted(error: ApiError) -> Response | None:
    """Respond to a request for a deleted conversation with a page to write in."""
    if error.code != "not_found":
        return None
    return Response(_page(None, deleted=(request.view_args or {}).get("conversation_id")))


@bp.post("/chats/<conversation_id>/rename")
def rename(conversation_id: str) -> Response:
    services().chats.rename(conversation_id, request.form.get("title", ""))
    return see_other(url_for("chat.conversation", conversation_id=conversation_id))


@bp.post("/chats/<conversation_id>/delete")
def delete(conversation_id: str) -> Response:
    services().chats.delete(conversation_id)
    return see_other(url_for("chat.newest"))


@bp.get("/messages/<message_id>")
def message(message_id: str) -> str:
    return render_template("fragments/message.html", message=services().chats.message(message_id))


@bp.get("/messages/<message_id>/text")
def text(message_id: str) -> Response:
    """Return a message as plain text: for answers too long to be formatted, and for copying."""
    return Response(services().chats.message(message_id).content, mimetype="text/plain")


@bp.post("/messages/<message_id>/stop")
def stop(message_id: str) -> Response:
    return _changed(services().chats.stop(message_id).conversation_id)


@bp.post("/messages/<message_id>/retry")
def retry(message_id: str) -> Response:
    return _changed(services().chats.retry(message_id).conversation_id)


@bp.post("/messages/<message_id>/show")
def show(message_id: str) -> Response:
    """Show this version of an answer."""
    return _changed(services().chats.show(message_id).conversation_id, anchor=f"message-{message_id}")


@bp.get("/messages/<message_id>/stream")
def stream(message_id: str) -> Response:
    """Stream a message: `text` events with what is new of its HTML, then one `final` with the whole message.

    A new request starts with everything so far, so a lost connection loses nothing.
    """
    services().chats.message(message_id)  # 404 for an unknown message, before the stream begins
    return sse(stream_with_context(answer_stream.events(services().chats, message_id)))


@bp.get("/fragments/chat-status")
def status() -> Response:
    """Return what has changed on the Chat page since its last poll, or 204, on which htmx changes nothing."""
    html = _news()
    answer: Response = make_response(html) if html.strip() else make_response("", 204)
    return answer


def drawn_news(marks: Mapping[str, str]) -> str | None:
    """Return what a page with these marks lacks, if that was drawn for other pages already; None if it was not.

    Needs no request. Raises ConversationNotFound.
    """
    live, mark = live_now(), NOTHING
    pieces, since = drawn_menu(live), marks.get(SINCE)
    if pieces is None or since is None:
        return None
    if wanted := marks.get("conversation"):
        extent = Extent.of(marks)
        outline = services().chats.outline(wanted, extent.since or 0)
        mark = _mark(outline.conversation, outline.states)
        if extent.since is None or marks.get("seen") != mark:
            return None
    news = pieces.since(since)
    if marks.get("around") != _surroundings(live, mark) or (news and not wanted):
        return None
    return news


def _news() -> str:
    """Return what has changed; messages only if the page's mark for them (`seen`) is outdated."""
    wanted, seen, extent = request.args.get("conversation"), request.args.get("seen"), Extent.of(request.args)
    if not wanted:
        return _pieces(_always(None, NOTHING), with_messages=False)
    try:
        outline = services().chats.outline(wanted, extent.since or 0)
        if extent.since is not None and seen == _mark(outline.conversation, outline.states):
            return _pieces(_unchanged(outline), with_messages=False)
        return _pieces(_context(wanted, extent), with_messages=True)
    except ConversationNotFound:
        return _pieces(_context(None, extent, deleted=wanted), with_messages=True)


@bp.get("/fragments/conversations")
def conversations() -> str:
    """Return the list of conversations, as long as requested."""
    listed = ConversationPage.of(services().chats, Extent.of(request.args))
    return render_template("fragments/conversations.html", listed=listed, current=request.args.get("current"))


def _text() -> str:
    text: str = request.form.get("text", "")
    return text


def _message_id() -> str | None:
    """Return the id that the page gave to the message, which makes sending idempotent."""
    given = request.form.get("id", "")
    return given if _ID.fullmatch(given) else None


def _page(
    conversation_id: str | None, *, deleted: str | None = None, typed: str | None = None, unsent: str | None = None
) -> str:
    """Render the whole page. `typed` is the composer's text, `unsent` the reason why it was not sent."""
    context = _context(conversation_id, Extent.of(request.args), deleted)
    return render_template("pages/chat.html", typed=typed, unsent=unsent, **context)


def _pieces(context: dict[str, Any], with_messages: bool) -> str:
    """Render the pieces that a page lacks, by the marks in its fields of class "shown"."""
    since = request.values.get(SINCE)
    return render_template(
        "fragments/chat_live.html",
        with_messages=with_messages,
        news=context["pieces"].since(since) if since is not None else "",
        around=request.values.get("around") != context["surroundings"],
        **context,
    )


def _changed(conversation_id: str, *, anchor: str = "latest", trigger: str | None = None) -> Response:
    """Respond to a form that changed a conversation: its pieces for htmx, else a redirect."""
    if not request.htmx:
        return see_other(url_for("chat.conversation", conversation_id=conversation_id, _anchor=anchor))
    pieces = _pieces(_context(conversation_id, Extent.of(request.form)), with_messages=True)
    answer: Response = make_response(pieces, trigger=trigger)
    return answer


def _context(conversation_id: str | None, extent: Extent, deleted: str | None = None) -> dict[str, Any]:
    """Return the context of a whole page; `deleted` is the id of a requested conversation that is gone.

    Raises ConversationNotFound.
    """
    chats = services().chats
    context = {**_always(None, NOTHING), "listed": ConversationPage.of(chats, extent), "current": conversation_id}
    if conversation_id is None:
        return {**context, "deleted": deleted}
    latest = chats.page_start(conversation_id)
    shown = chats.get(conversation_id, latest if extent.since is None else min(latest, extent.since))
    last = shown.messages[-1] if shown.messages else None
    return {
        **context,
        **_always(shown, _mark(shown, [(m.id, m.state) for m in shown.messages])),
        "answering": last if last is not None and not last.final else None,
        "before": chats.page_start(conversation_id, shown.earlier) if shown.earlier else None,
    }


def _unchanged(outline: Outline) -> dict[str, Any]:
    """Return the context for a page whose messages and list are current."""
    mark = _mark(outline.conversation, outline.states)
    return {**_always(outline.conversation, mark), "answering": outline.answering}


def _always(shown: Conversation | None, mark: str) -> dict[str, Any]:
    live = live_now()
    return {
        "live": live,
        "pieces": menu_pieces(live),
        "menu": menu_lists(live),
        "surroundings": _surroundings(live, mark),
        "conversation": shown,
        "message_id": new_id(),
        "mark": mark,
        "back": url_for("chat.conversation", conversation_id=shown.id) if shown else "/chats/new",
    }


def _surroundings(live: Live, mark: str) -> str:
    """Return a hash of everything the composer and the poll element show."""
    shown = live.subject
    composer = (live.lock, shown and shown.id, live.active and live.active.id, bool(live.text_models))
    seen = (mark, *composer, live.status.moving, live.poll_seconds, live.announcement)
    return f"{zlib.crc32(repr(seen).encode()):08x}"


def _mark(shown: Conversation, states: Iterable[tuple[str, MessageState]]) -> str:
    """Return a hash of a conversation's title and the ids and states of its messages."""
    seen = [shown.title, *(f"{message_id}{state}" for message_id, state in states)]
    return f"{zlib.crc32(repr(seen).encode()):08x}"
