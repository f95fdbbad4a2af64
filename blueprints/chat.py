"""The Chat page: conversations, messages that stream in, and the forms that write them."""

from __future__ import annotations

import re
import zlib

from flask import Blueprint, Response, render_template, stream_with_context, url_for
from htmx_flask import make_response, request

from blueprints import answer_stream
from blueprints.markdown.growing import Look
from blueprints.pages import live_now, see_other
from blueprints.web import ApiError, services, sse, tells_errors_of
from services.chats import Conversation, ConversationNotFound, Message
from services.store.records import new_id

bp = Blueprint("chat", __name__)

SENT = "message-sent"
"""The event by which the page knows that its message has arrived; only then does it empty the composer."""
DELETED = "This conversation was deleted. Send the message again to begin a new chat with it."
_ID = re.compile("[0-9a-f]{32}")


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
    """Begin a conversation with its first message."""
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


@tells_errors_of("chat.create", "chat.send")
def tell_unsent(error: ApiError) -> Response:
    """A message that was not sent: what was typed stays in the composer, and beside it stands why."""
    wanted = (request.view_args or {}).get("conversation_id")
    deleted = error.code == "not_found"
    words = DELETED if deleted else error.message
    if request.htmx:
        html = render_template("fragments/unsent.html", unsent=words)
        answer: Response = make_response(
            html, retarget="#composer-error", reswap="innerHTML", trigger="refresh" if deleted else None
        )
        return answer
    shown = services().chats.get(wanted) if wanted and not deleted else None
    return Response(_page(shown, deleted=wanted if deleted else None, typed=_text(), unsent=words))


@tells_errors_of("chat.conversation")
def tell_no_conversation(error: ApiError) -> Response | None:
    """A conversation that is not there any more: its page stays one to write in."""
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
        return _pieces(None, with_messages=True, deleted=wanted)
    return _pieces(shown, with_messages=request.args.get("seen") != _mark(shown))


def _text() -> str:
    text: str = request.form.get("text", "")
    return text


def _message_id() -> str | None:
    """The id that the page gave to the message, by which it is known if it comes twice."""
    given = request.form.get("id", "")
    return given if _ID.fullmatch(given) else None


def _page(
    shown: Conversation | None, *, deleted: str | None = None, typed: str | None = None, unsent: str | None = None
) -> str:
    """The whole page. `typed` is put into the composer, `unsent` says beside it why it was not sent."""
    return render_template("pages/chat.html", typed=typed, unsent=unsent, **_context(shown, deleted))


def _pieces(shown: Conversation | None, with_messages: bool, deleted: str | None = None) -> str:
    return render_template("fragments/chat_live.html", with_messages=with_messages, **_context(shown, deleted))


def _changed(conversation_id: str, *, anchor: str = "latest", trigger: str | None = None) -> Response:
    """The answer to a form that changed a conversation: its pieces for htmx, the page otherwise."""
    if not request.htmx:
        return see_other(url_for("chat.conversation", conversation_id=conversation_id, _anchor=anchor))
    pieces = _pieces(services().chats.get(conversation_id), with_messages=True)
    answer: Response = make_response(pieces, trigger=trigger)
    return answer


def _context(shown: Conversation | None, deleted: str | None = None) -> dict[str, object]:
    """What the page's templates need; `deleted` is the id of the conversation that should have been shown."""
    last = shown.messages[-1] if shown and shown.messages else None
    return {
        "live": live_now(),
        "conversations": services().chats.conversations(),
        "conversation": shown,
        "deleted": deleted,
        "message_id": new_id(),
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
