"""Text by a model of the catalogue, pictures by the image server, judgements by the vision server."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from services.answers import Delta
from services.cancellation import CancelToken
from services.gateway.deltas import split_thoughts
from services.providers.adapters.pictures import MAX_PICTURE_BYTES, picture_of
from services.providers.adapters.replies import document_of
from services.providers.adapters.scores import UnreadableScore, figure, total_of
from services.providers.adapters.upstream import Upstream
from services.providers.ports import ChatMessage, Picture, ProviderError, Score

TEXT_BYTES = 2_000_000
SCORE_BYTES = 100_000
SEEDS = 2**32
SMALLEST, LARGEST, MULTIPLE = 64, 2048, 16
"""The sides that the image server draws, in pixels."""
BEST_AESTHETIC = 10.0


class _LocalProvider:
    """What the three have in common. `name` is the provider's, `model` what serves it, None if unknown."""

    def __init__(self, name: str, upstream: Upstream, model: str | None, at_once: int) -> None:
        self.name = name
        self.model = model
        self.at_once = at_once
        self._upstream = upstream

    def make_ready(self, token: CancelToken) -> float:
        return self._upstream.make_ready(token)


class LocalText(_LocalProvider):
    """Text by a chat model."""

    def complete(
        self,
        messages: Sequence[ChatMessage],
        token: CancelToken,
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> str:
        body: dict[str, object] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if seed is not None:
            body["seed"] = seed % 2**31  # vLLM and Ollama take no larger ones
        reply = self._upstream.post("/v1/chat/completions", body, token, TEXT_BYTES)
        text = _without_thoughts(_content(document_of(reply, self._upstream.title)))
        if not text.strip():
            raise ProviderError("bad_answer", f"{self._upstream.title}'s answer holds no text.")
        return text


class FluxImage(_LocalProvider):
    """Pictures by the image server."""

    def generate(self, prompt: str, token: CancelToken, *, width: int, height: int, seed: int | None) -> Picture:
        body: dict[str, object] = {"prompt": prompt, "width": side(width), "height": side(height), "format": "png"}
        if seed is not None:
            body["seed"] = seed % SEEDS
        reply = self._upstream.post("/generate", body, token, MAX_PICTURE_BYTES)
        return picture_of(reply.content, self._upstream.title)


class LocalVision(_LocalProvider):
    """Judgements by the vision server."""

    def score(self, picture: Picture, prompt: str, token: CancelToken) -> Score:
        body = {"image": base64.b64encode(picture.data).decode("ascii"), "prompt": prompt}
        said = document_of(self._upstream.post("/score", body, token, SCORE_BYTES), self._upstream.title)
        try:
            alignment = figure(said.get("alignment"), "alignment")
            if said.get("aesthetic") is None:
                return Score(alignment, alignment, alignment, "How it looks was not judged: those weights are missing.")
            aesthetic = figure(said.get("aesthetic"), "aesthetic", BEST_AESTHETIC) / BEST_AESTHETIC
            total = figure(said.get("total", total_of(alignment, aesthetic)), "total")
        except UnreadableScore as error:
            raise ProviderError("bad_answer", f"{self._upstream.title}'s score can't be used: {error}.") from None
        return Score(alignment, aesthetic, total)


def side(pixels: int) -> int:
    """Return the side nearest to `pixels` that the image server draws."""
    return min(max(round(pixels / MULTIPLE) * MULTIPLE, SMALLEST), LARGEST)


def _content(document: Mapping[str, object]) -> str:
    choices = document.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, str) else ""


def _without_thoughts(content: str) -> str:
    """Return what a model answered, without what it thought before that."""
    answered: list[str] = []
    for delta in split_thoughts([Delta(content)]):
        if delta.all_before:
            answered.clear()
        elif not delta.thought:
            answered.append(delta.text)
    return "".join(answered)
