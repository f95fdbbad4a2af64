"""The Chat page with a long history: 10,000 conversations, the newest with 2,000 messages.

Each time is from sending the request to the end of the page, compressed as for a browser, on a kept-alive connection.
The first request renders the answers; later ones reuse their cached HTML. `held up` is the longest time that another
request, for `/v1/models/status`, took while the console rendered a page with the longest answer that is still
formatted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

from bench import wire
from bench.figures import Row, spread
from bench.rig import Rig
from blueprints.markdown import FORMAT_LIMIT
from services.store.database import open_store
from tests.support.console import Console
from tests.support.talk import put_conversations

CONVERSATIONS = 10_000
MESSAGES = 2_000
LOOKS = 20
LOOK_SECONDS = 0.005
TARGET_SECONDS = 0.3
TARGET_HELD_UP_SECONDS = 0.05
PARAGRAPH = "Some **words** of an answer with `code`, a [link](https://example.org/) and a list:\n\n- one\n- two\n\n"
ANSWER = PARAGRAPH * (2_400 // len(PARAGRAPH))
LONGEST = PARAGRAPH * (FORMAT_LIMIT // len(PARAGRAPH))


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.console()
    console.start()
    conversations, messages = rig.times(CONVERSATIONS), rig.times(MESSAGES)
    with closing(open_store(Path(console.environment["SWITCHYARD_STATE_DIR"]) / "switchyard.db")) as store:
        talk = put_conversations(store, conversations, (f"{number}. {ANSWER}" for number in range(messages)))[-1]
        with wire.Wire(console.port) as connection:
            _open(connection, "/chats/new")  # templates are compiled at their first use
            first = _open(connection, f"/chats/{talk}")
            again = [_open(connection, f"/chats/{talk}").seconds for _ in range(LOOKS)]
        yield Row(
            f"page with {conversations:,} conversations and {messages:,} messages",
            f"{first.seconds:.2f} s at first, {spread(again, '.3f')} s after that; {len(first.body) / 1000:.0f} KB",
            f"< {TARGET_SECONDS} s",
            first.seconds < TARGET_SECONDS,
            {"first_seconds": first.seconds, "seconds": median(again), "kilobytes": len(first.body) / 1000},
        )
        with store.writing() as database:
            database.exec_driver_sql("DELETE FROM conversations")
        longest = put_conversations(store, 1, ["Tell me", LONGEST])[-1]
    seconds, held_up = _held_up(console, f"/chats/{longest}")
    yield Row(
        f"others held up while an answer of {FORMAT_LIMIT / 1000:.0f} kB is rendered",
        f"{1000 * held_up:.0f} ms of {seconds:.1f} s",
        f"< {1000 * TARGET_HELD_UP_SECONDS:.0f} ms",
        held_up < TARGET_HELD_UP_SECONDS,
        {"held_up_seconds": held_up, "seconds": seconds},
    )


def _open(connection: wire.Wire, path: str) -> wire.Answer:
    return connection.ask_well(wire.get(path, Accept="text/html", Accept_Encoding="gzip"))


def _held_up(console: Console, path: str) -> tuple[float, float]:
    """Seconds that the page took, and the slowest of the status requests meanwhile."""
    over = threading.Event()
    seconds: list[float] = []

    def render() -> None:
        with wire.Wire(console.port) as connection:
            seconds.append(_open(connection, path).seconds)
        over.set()

    page = threading.Thread(target=render)
    slowest = 0.0
    with wire.Wire(console.port) as connection:
        page.start()
        while not over.is_set():
            slowest = max(slowest, connection.ask_well(wire.get("/v1/models/status")).seconds)
            time.sleep(LOOK_SECONDS)
    page.join()
    return seconds[0], slowest
