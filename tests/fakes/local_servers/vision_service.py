#!/usr/bin/env python3
"""A fake of `services/local_servers/vision_service.py`: its interface, with scores taken from a hash.

The same picture and prompt always get the same scores. `faults.py` lists the faults that FAKE_VISION_FAULT may name.
"""

from __future__ import annotations

import hashlib
import json
import signal
from typing import Any

from faults import FakeModel, Faults  # first: it makes the servers' own modules importable

# isort: split
from errors import RequestError
from program import arguments, leave, serve
from serving import Exchange
from vision_api import MAX_BODY_BYTES, Judgement, vision_routes
from work import Job

NAN = float("nan")


class FakeVision(FakeModel):
    """Judges by hash."""

    name = "vision"
    max_body_bytes = MAX_BODY_BYTES

    def __init__(self, model: str, captioner: str | None, faults: Faults) -> None:
        super().__init__(model, faults, 600_000_000)
        self._captioner = captioner
        self._score = vision_routes(self)["/score"]
        self.routes = {**vision_routes(self), "/score": self.answer_score}

    def answer_score(self, body: dict[str, Any], exchange: Exchange) -> None:
        if self.faults.applies("nan", str(body.get("prompt"))):
            exchange.send("application/json", json.dumps({"alignment": NAN, "aesthetic": NAN, "total": NAN}).encode())
        else:
            self._score(body, exchange)

    def score(self, image: bytes, prompt: str, job: Job) -> Judgement:
        self.work(prompt, 1, job)
        digest = hashlib.sha256(image + prompt.encode()).digest()
        return Judgement(int.from_bytes(digest[:2]) / 65_535, 10 * int.from_bytes(digest[2:4]) / 65_535)

    def describe(self, image: bytes, job: Job) -> str:
        if self._captioner is None:
            raise RequestError(501, "not_supported", "No captioner is configured: start the server with --captioner.")
        self.work("", 1, job)
        return f"Stripes in the colours {hashlib.sha256(image).hexdigest()[:6]}"


def main() -> int:
    parser = arguments("A fake vision server.", 8002, "openai/clip-vit-large-patch14")
    parser.add_argument("--captioner")
    given = parser.parse_args()
    faults = Faults("FAKE_VISION_FAULT")
    signals = [signal.SIGINT] if "ignore-sigterm" in faults else [signal.SIGINT, signal.SIGTERM]
    if "ignore-sigterm" in faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return serve(FakeVision(given.model, given.captioner, faults), given.host, given.port, signals)


if __name__ == "__main__":
    leave(main())
