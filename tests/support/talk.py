"""Conversations put into a database as they lie there, without anybody having to say them."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import insert

from services.store.database import Store
from services.store.tables import ConversationRow, MessageRow


def put_conversations(
    store: Store, count: int, messages: Iterable[str] = (), title: str = "Talk {number}", model: str | None = None
) -> list[str]:
    """So many conversations, each a second newer than the one before; their ids, the newest last.

    The newest one has these messages, a question and an answer in turn; the last 32 letters of an id count.
    """
    ids = [f"{number:032x}" for number in range(count)]
    rows = [
        {"id": i, "title": title.format(number=n), "created_at": 1.0, "updated_at": float(n)} for n, i in enumerate(ids)
    ]
    said = [
        {
            "id": f"{number:031x}m",
            "conversation_id": ids[-1],
            "position": number,
            "role": ("user", "assistant")[number % 2],
            "content": content,
            "state": "complete",
            "model": model if number % 2 else None,
            "created_at": 1.0,
            "thinking": "",
            "context_full": False,
        }
        for number, content in enumerate(messages)
    ]
    with store.writing() as session:
        session.execute(insert(ConversationRow), rows)
        if said:
            session.execute(insert(MessageRow), said)
    return ids
