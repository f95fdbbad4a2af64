"""In-memory providers of text, pictures and scores for the Studio's job. They count what they are asked at once."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable
from contextlib import contextmanager

from services.cancellation import CancelToken
from services.providers.ports import JobProviders, Picture, ProviderError, Score
from services.scheduling import Scheduler, ThreadScheduler, pause

Trouble = Callable[[int, CancelToken], None]
"""Called with the number of each call, from 0; raises what the provider raises, or waits."""


def no_trouble(_number: int, _token: CancelToken) -> None: ...


def png(seed: int, side: int = 4) -> bytes:
    """A small picture that a seed decides."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour = hashlib.sha256(str(seed).encode()).digest()[:3]
    rows = b"".join(b"\0" + colour * side for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def listing(count: int, seed: int | None = 0) -> str:
    """A candidate list as a well-behaved model writes it."""
    items = [{"what": f"thing {seed}-{number}", "how": f"look {number}"} for number in range(count)]
    return json.dumps(items)


class FakeProvider:
    """What the three have in common; `at_once` calls may overlap, each lasts `seconds`."""

    def __init__(
        self,
        name: str,
        *,
        scheduler: Scheduler | None = None,
        at_once: int = 4,
        seconds: float = 0.0,
        ready_seconds: float = 0.0,
        trouble: Trouble = no_trouble,
        ready_trouble: Trouble = no_trouble,
        model: str | None = None,
    ) -> None:
        self.name = name
        self.model = model or f"{name}-model"
        self.at_once = at_once
        self.calls = 0
        self.running = 0
        self.most_at_once = 0
        self.readied = 0
        self._scheduler = scheduler or ThreadScheduler()
        self._seconds = seconds
        self._ready_seconds = ready_seconds
        self._trouble = trouble
        self._ready_trouble = ready_trouble

    def make_ready(self, token: CancelToken) -> float:
        number = self.readied
        self.readied += 1
        self._ready_trouble(number, token)
        if self._ready_seconds:
            pause(self._scheduler, self._ready_seconds, token)
        return self._ready_seconds

    @contextmanager
    def _call(self, token: CancelToken):
        number = self.calls
        self.calls += 1
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            if self._seconds:
                pause(self._scheduler, self._seconds, token)
            token.check()
            self._trouble(number, token)
            yield number
        finally:
            self.running -= 1


class FakeText(FakeProvider):
    """`answer` makes the text from how many items were asked for and the seed."""

    def __init__(self, name: str = "words", answer: Callable[[int, int | None], str] = listing, **options) -> None:
        super().__init__(name, **options)
        self.answer = answer
        self.asked: list[str] = []

    def complete(self, messages, token, *, seed, **_options) -> str:
        with self._call(token):
            request = messages[-1]["content"]
            self.asked.append(request)
            count = int(re.search(r"Write (\d+) item", request)[1])
            return self.answer(count, seed)


class FakeImages(FakeProvider):
    """Draws a picture that the prompt and the seed decide."""

    def __init__(self, name: str = "brush", draw: Callable[[str, int], bytes] | None = None, **options) -> None:
        super().__init__(name, **options)
        self._draw = draw or (lambda prompt, seed: png(hash_of(prompt, seed)))

    def generate(self, prompt, token, *, seed, **_size) -> Picture:
        with self._call(token):
            return Picture(self._draw(prompt, seed), "image/png")


class FakeVision(FakeProvider):
    """Gives a score that the picture decides."""

    def __init__(self, name: str = "eye", judge: Callable[[Picture], Score] | None = None, **options) -> None:
        super().__init__(name, **options)
        self._judge = judge or by_content

    def score(self, picture, _prompt, token) -> Score:
        with self._call(token):
            return self._judge(picture)


def hash_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def by_content(picture: Picture) -> Score:
    """A score from a picture's bytes, with one digit, so that ties happen."""
    drawn = hashlib.sha256(picture.data).digest()
    alignment, aesthetic = drawn[0] % 11 / 10, drawn[1] % 11 / 10
    return Score(alignment, aesthetic, round((alignment + aesthetic) / 2, 1))


def refusing(
    code: str, message: str = "no", *, calls: range | None = None, retry_after: float | None = None
) -> Trouble:
    """Trouble that refuses the calls with these numbers; all by default."""

    def trouble(number: int, _token: CancelToken) -> None:
        if calls is None or number in calls:
            raise ProviderError(code, message, retry_after)

    return trouble


def fake_providers(scheduler: Scheduler | None = None, **options) -> JobProviders:
    """All three, each with these options of FakeProvider."""
    return JobProviders(
        FakeText(scheduler=scheduler, **options),
        FakeImages(scheduler=scheduler, **options),
        FakeVision(scheduler=scheduler, **options),
    )
