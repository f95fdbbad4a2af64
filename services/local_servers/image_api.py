"""What the image server answers: `/generate` with steps as events, and OpenAI's `/v1/images/generations`."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from checks import integer, text
from errors import invalid
from serving import Exchange
from work import Job

MAX_BODY_BYTES = 64_000
PROMPT_CHARACTERS = 4_000
SMALLEST, LARGEST, MULTIPLE = 64, 2_048, 16
"""Width and height in pixels. FLUX packs its latents, an eighth of the size, two by two."""
MOST_STEPS = 50
MOST_IMAGES = 4
SEEDS = 2**32
FIELDS = {"prompt", "width", "height", "steps", "seed", "format"}


@dataclass(frozen=True)
class ImageRequest:
    """One picture to generate."""

    prompt: str
    width: int
    height: int
    steps: int
    seed: int


class Painter(Protocol):
    """What generates pictures."""

    @property
    def default_steps(self) -> int:
        """Return how many steps a picture takes if the request doesn't say."""

    def paint(self, request: ImageRequest, job: Job) -> bytes:
        """Return a PNG, calling `job.step` after each step, which ends cancelled work. May raise RequestError."""


def image_routes(painter: Painter) -> dict[str, Callable[[dict[str, Any], Exchange], None]]:
    """Return the routes that answer with the painter's pictures."""

    def generate(body: dict[str, Any], exchange: Exchange) -> None:
        unknown = sorted(set(body) - FIELDS)
        if unknown:
            raise invalid(f"Unknown: {', '.join(unknown)[:200]}. A request has {', '.join(sorted(FIELDS))}.")
        form = body.get("format", "png")
        if form not in ("png", "base64"):
            raise invalid("format must be png or base64.")
        request = ImageRequest(
            prompt=text(body, "prompt", PROMPT_CHARACTERS),
            width=_side(integer(body, "width", 1024, SMALLEST, LARGEST), "width"),
            height=_side(integer(body, "height", 1024, SMALLEST, LARGEST), "height"),
            steps=integer(body, "steps", None, 1, MOST_STEPS) or painter.default_steps,
            seed=_seed(body),
        )
        label = _label(request)

        def work(job: Job) -> Mapping[str, object]:
            started = time.monotonic()
            png = painter.paint(request, job)
            return {"image": png, "seed": request.seed, "seconds": round(time.monotonic() - started, 3)}

        if exchange.wants_events:
            exchange.stream(label, lambda job: _in_base64(work(job)))
            return
        made = exchange.run(label, work)
        if form == "base64":
            exchange.send_json(_in_base64(made))
        else:
            about = {"X-Seed": str(made["seed"]), "X-Seconds": str(made["seconds"])}
            exchange.send("image/png", made["image"], about)

    def generations(body: dict[str, Any], exchange: Exchange) -> None:
        """Answer in OpenAI's form. Fields of other models, such as `quality`, are ignored, as is the model's name."""
        if body.get("response_format") not in (None, "b64_json"):
            raise invalid("response_format must be b64_json: nothing is kept here that a URL could name.")
        count = integer(body, "n", 1, 1, MOST_IMAGES) or 1
        width, height = _size(body.get("size"))
        prompt = text(body, "prompt", PROMPT_CHARACTERS)
        first = ImageRequest(prompt, width, height, painter.default_steps, _seed(body))

        def work(job: Job) -> list[bytes]:
            return [painter.paint(replace(first, seed=(first.seed + n) % SEEDS), job) for n in range(count)]

        made = exchange.run(f"{_label(first)}, {count} of them", work)
        data = [{"b64_json": base64.b64encode(png).decode()} for png in made]
        exchange.send_json({"created": int(time.time()), "data": data})

    return {"/generate": generate, "/v1/images/generations": generations}


def _in_base64(made: Mapping[str, Any]) -> dict[str, object]:
    return {**made, "image": base64.b64encode(made["image"]).decode()}


def _label(request: ImageRequest) -> str:
    return f"Generation of {request.width}x{request.height} in {request.steps} steps, seed {request.seed}"


def _seed(body: Mapping[str, Any]) -> int:
    seed = integer(body, "seed", None, 0, SEEDS - 1)
    return random.randrange(SEEDS) if seed is None else seed


def _size(value: object) -> tuple[int, int]:
    if value is None or value == "auto":
        return 1024, 1024
    parts = value.split("x") if isinstance(value, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 5 for part in parts):
        raise invalid("size must be like 1024x1024.")
    sides = {"width": int(parts[0]), "height": int(parts[1])}
    return tuple(_side(integer(sides, name, None, SMALLEST, LARGEST), name) for name in sides)  # type: ignore[return-value]


def _side(value: int | None, name: str) -> int:
    if value is None or value % MULTIPLE:
        raise invalid(f"{name} must be a multiple of {MULTIPLE}.")
    return value
