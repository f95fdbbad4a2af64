"""What the vision server answers: `/score` and `/describe`."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from checks import text
from errors import RequestError, invalid
from serving import Exchange
from work import Job

MAX_IMAGE_BYTES = 20_000_000
MAX_BODY_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 64_000
PROMPT_CHARACTERS = 4_000
BEST_AESTHETIC = 10.0
ALIGNMENT_SHARE = 0.7
"""Of the total: whether a picture shows what was asked for counts more than whether it is pretty."""
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
"""How PNG, JPEG and WebP files begin."""


@dataclass(frozen=True)
class Judgement:
    """`alignment` is 0 to 1, `aesthetic` 0 to 10, or None where its weights are missing."""

    alignment: float
    aesthetic: float | None


class Judge(Protocol):
    """What looks at pictures. The pictures are the bytes of PNG, JPEG or WebP files, not yet decoded."""

    def score(self, image: bytes, prompt: str, job: Job) -> Judgement:
        """Return how well the picture shows the prompt, and how it looks. Raises RequestError."""

    def describe(self, image: bytes, job: Job) -> str:
        """Return a sentence about the picture. Raises RequestError: 501 if there is no captioner."""


def vision_routes(judge: Judge) -> dict[str, Callable[[dict[str, Any], Exchange], None]]:
    """Return the routes that answer with what the judge says."""

    def score(body: dict[str, Any], exchange: Exchange) -> None:
        image = picture(body)
        prompt = text(body, "prompt", PROMPT_CHARACTERS)
        judged = exchange.run("Score", lambda job: judge.score(image, prompt, job))
        exchange.send_json(answer(judged))

    def describe(body: dict[str, Any], exchange: Exchange) -> None:
        image = picture(body)
        description = exchange.run("Description", lambda job: judge.describe(image, job))
        exchange.send_json({"description": description})

    return {"/score": score, "/describe": describe}


def picture(body: Mapping[str, Any]) -> bytes:
    """Return the file in the body's `image`. Raises RequestError if it is no PNG, JPEG or WebP, or is too large."""
    value = body.get("image")
    if not isinstance(value, str) or not value:
        raise invalid("image must be a file in base64.")
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid("image is not valid base64.") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise RequestError(413, "too_large", f"The image is larger than {MAX_IMAGE_BYTES / 1e6:.0f} MB.")
    if not data.startswith(SIGNATURES):
        raise invalid("image is not a PNG, JPEG or WebP file.")
    return data


def answer(judged: Judgement) -> dict[str, object]:
    """Return the scores as JSON's values. Raises RequestError if one is not a number: NaN is not JSON."""
    if not all(math.isfinite(value) for value in (judged.alignment, judged.aesthetic or 0.0)):
        raise RequestError(500, "bad_score", "The model's score is not a number.")
    alignment = min(max(judged.alignment, 0.0), 1.0)
    if judged.aesthetic is None:
        return {"alignment": alignment, "aesthetic": None, "total": alignment}
    aesthetic = min(max(judged.aesthetic, 0.0), BEST_AESTHETIC)
    total = ALIGNMENT_SHARE * alignment + (1 - ALIGNMENT_SHARE) * aesthetic / BEST_AESTHETIC
    return {"alignment": alignment, "aesthetic": aesthetic, "total": total}
