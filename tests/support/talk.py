"""Insert conversations directly into a database."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import insert

from services.store.database import Store
from services.store.tables import CONVERSATIONS, MESSAGES


def put_conversations(
    store: Store, count: int, messages: Iterable[str] = (), title: str = "Talk {number}", model: str | None = None
) -> list[str]:
    """Insert `count` conversations, each a second newer than the one before; return their ids, the newest last.

    The newest has these messages, alternating question and answer. The ids are 32 hexadecimal digits that count up.
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
    with store.writing() as connection:
        connection.execute(insert(CONVERSATIONS), rows)
        if said:
            connection.execute(insert(MESSAGES), said)
    return ids
