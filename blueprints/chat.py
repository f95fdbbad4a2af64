"""The Chat page: conversations, messages that stream in, and the forms that write them."""

from __future__ import annotations

import zlib

from flask import Blueprint, Response, render_template, stream_with_context, url_for
from htmx_flask import make_response, request

from blueprints import answer_stream
from blueprints.markdown.growing import Look
from blueprints.pages import live_now, see_other
from blueprints.web import services, sse
from services.chats import Conversation, ConversationNotFound, Message

bp = Blueprint("chat", __name__)


@bp.app_template_filter()
def look(message: Message) -> Look:
    """The HTML of an answer under way."""
    return answer_stream.look_at(message, services().chats)


@bp.get("/")
def newest() -> str:
    """The conversation last written in, or an empty page with the next step."""
    conversations = services().chats.conversations()
    return _page(services().chats.get(conversations[0].id) if conversations else None)


@bp.get("/chats/new")
def new() -> str:
    """An empty page to write in. The conversation begins with its first message."""
    return _page(None)


@bp.get("/chats/<conversation_id>")
def conversation(conversation_id: str) -> str:
    return _page(services().chats.get(conversation_id))


@bp.post("/chats")
def create() -> Response:
    """Begin a conversation, with its first message where there is one."""
    chats, text = services().chats, request.form.get("text", "")
    begun = chats.start(text).conversation_id if text.strip() else chats.create().id
    return see_other(url_for("chat.conversation", conversation_id=begun))


@bp.post("/chats/<conversation_id>/messages")
def send(conversation_id: str) -> Response:
    services().chats.send(conversation_id, request.form.get("text", ""))
    return _changed(conversation_id)


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
    """What was written, as it was written: for answers too long to be formatted, and for copying."""
    return Response(services().chats.message(message_id).content, mimetype="text/plain")


@bp.post("/messages/<message_id>/stop")
def stop(message_id: str) -> Response:
    return _changed(services().chats.stop(message_id).conversation_id)


@bp.post("/messages/<message_id>/retry")
def retry(message_id: str) -> Response:
    return _changed(services().chats.retry(message_id).conversation_id)


@bp.post("/messages/<message_id>/show")
def show(message_id: str) -> Response:
    """Show this one of the answers to a message."""
    return _changed(services().chats.show(message_id).conversation_id, anchor=f"message-{message_id}")


@bp.get("/messages/<message_id>/stream")
def stream(message_id: str) -> Response:
    """A message as it grows: `text` events with what is new of its HTML, then one `final` with the whole message.

    Asking again at any time gives the same message from where it stands, so a lost connection loses nothing.
    """
    services().chats.message(message_id)  # an unknown message is a 404, not a stream that fails
    return sse(stream_with_context(answer_stream.events(services().chats, message_id)))


@bp.get("/fragments/chat-status")
def status() -> str | Response:
    """What changes on the Chat page; the messages too, when they are not the ones that the page has `seen`."""
    wanted = request.args.get("conversation")
    try:
        shown = services().chats.get(wanted) if wanted else None
    except ConversationNotFound:
        answer: Response = make_response("", redirect="/")  # deleted in another tab
        return answer
    return _pieces(shown, with_messages=request.args.get("seen") != _mark(shown))


def _page(shown: Conversation | None) -> str:
    return render_template("pages/chat.html", **_context(shown))


def _pieces(shown: Conversation | None, with_messages: bool) -> str:
    return render_template("fragments/chat_live.html", with_messages=with_messages, **_context(shown))


def _changed(conversation_id: str, anchor: str = "latest") -> Response:
    """The answer to a form that changed a conversation: its pieces for htmx, the page otherwise."""
    if not request.htmx:
        return see_other(url_for("chat.conversation", conversation_id=conversation_id, _anchor=anchor))
    answer: Response = make_response(_pieces(services().chats.get(conversation_id), with_messages=True))
    return answer


def _context(shown: Conversation | None) -> dict[str, object]:
    last = shown.messages[-1] if shown and shown.messages else None
    return {
        "live": live_now(),
        "conversations": services().chats.conversations(),
        "conversation": shown,
        "answering": last if last is not None and not last.final else None,
        "mark": _mark(shown),
        "back": url_for("chat.conversation", conversation_id=shown.id) if shown else "/chats/new",
    }


def _mark(shown: Conversation | None) -> str:
    """A short word that changes whenever a conversation's messages or title do."""
    if shown is None:
        return "none"
    seen = [shown.title, *(f"{m.id}{m.state}" for m in shown.messages)]
    return f"{zlib.crc32(repr(seen).encode()):08x}"
