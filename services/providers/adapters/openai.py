"""Text, pictures and judgements by OpenAI's API, or one like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from services.cancellation import CancelToken
from services.providers.adapters.openai_api import OpenAIApi
from services.providers.adapters.pictures import MAX_PICTURE_BYTES, data_url, picture_of_base64
from services.providers.adapters.scores import QUESTION, UnreadableScore, parse_score
from services.providers.ports import ChatMessage, Picture, ProviderError, Score

if TYPE_CHECKING:
    import openai

CHAT_SECONDS = 180.0
IMAGE_SECONDS = 300.0
CHAT_BYTES = 1_000_000
IMAGE_BYTES = MAX_PICTURE_BYTES * 4 // 3 + 100_000
THINKING_TOKENS = 4_000
"""Added to the limit of an answer: models that think before they answer count their thoughts."""
SCORE_TOKENS = 300
SCORE_TRIES = 2


class _OpenAIProvider:
    """What the three have in common."""

    name = "openai"

    def __init__(self, api: OpenAIApi, model: str, at_once: int) -> None:
        self._api = api
        self.model = model
        self.at_once = at_once

    def make_ready(self, token: CancelToken) -> float:
        """Send nothing: a request may cost money. Raises ProviderError without a key."""
        token.check()
        if not self._api.has_key:
            raise ProviderError("provider_unavailable", "There is no key for OpenAI. Set OPENAI_API_KEY.")
        return 0.0

    def _chat(self, messages: Sequence[Mapping[str, Any]], token: CancelToken, **parameters: Any) -> str:
        """Return the answer's text. Raises ProviderError and Cancelled."""
        asked = {"model": self.model, "messages": messages, **parameters}
        return self._api.call(_complete, asked, token, seconds=CHAT_SECONDS, most_bytes=CHAT_BYTES)


class OpenAIText(_OpenAIProvider):
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
        parameters = {"max_completion_tokens": max_tokens + THINKING_TOKENS, "temperature": temperature}
        if seed is not None:
            parameters["seed"] = seed % 2**63
        return self._chat(messages, token, **parameters)


class OpenAIVision(_OpenAIProvider):
    """Judgements by a chat model that sees pictures."""

    def score(self, picture: Picture, prompt: str, token: CancelToken) -> Score:
        shown = [
            {"type": "text", "text": f"The wish: {prompt}"},
            {"type": "image_url", "image_url": {"url": data_url(picture)}},
        ]
        messages: list[Mapping[str, Any]] = [
            {"role": "system", "content": QUESTION},
            {"role": "user", "content": shown},
        ]
        trouble = ""
        for _ in range(SCORE_TRIES):
            answer = self._chat(
                messages,
                token,
                max_completion_tokens=SCORE_TOKENS + THINKING_TOKENS,
                temperature=0.0,
                response_format={"type": "json_object"},
            )
            try:
                return parse_score(answer)
            except UnreadableScore as error:
                trouble = str(error)
        raise ProviderError("bad_answer", f"{self.model} was asked {SCORE_TRIES} times for a score, and {trouble}.")


class OpenAIImage(_OpenAIProvider):
    """Pictures by an image model."""

    def generate(self, prompt: str, token: CancelToken, *, width: int, height: int, seed: int | None) -> Picture:
        """Return a picture in the model's size nearest to the one asked for. `seed` is ignored: the API has none."""
        del seed
        asked: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "n": 1,
            "size": size_for(self.model, width, height),
        }
        if not self.model.startswith("gpt-image"):  # which always sends base64, and refuses to be asked for it
            asked["response_format"] = "b64_json"
        text = self._api.call(_draw, asked, token, seconds=IMAGE_SECONDS, most_bytes=IMAGE_BYTES)
        return picture_of_base64(text, "OpenAI")


SIZES: Mapping[str, Sequence[tuple[int, int]]] = {
    "gpt-image": ((1024, 1024), (1536, 1024), (1024, 1536)),
    "dall-e-3": ((1024, 1024), (1792, 1024), (1024, 1792)),
    "dall-e-2": ((256, 256), (512, 512), (1024, 1024)),
}
"""The sizes that OpenAI's models draw, by the beginnings of their names; other models are asked for any."""


def size_for(model: str, width: int, height: int) -> str:
    """Return the size to ask for: of the model's own the one nearest in shape, then in size."""
    family = next((sizes for name, sizes in SIZES.items() if model.startswith(name)), None)
    if family is not None:
        shape, area = width / height, width * height
        width, height = min(family, key=lambda size: (abs(size[0] / size[1] - shape), abs(size[0] * size[1] - area)))
    return f"{width}x{height}"


def _complete(client: openai.OpenAI, parameters: Mapping[str, Any]) -> str:
    answer = client.chat.completions.create(**parameters)
    choices = getattr(answer, "choices", None) or ()
    message = choices[0].message if choices else None
    text = getattr(message, "content", None)
    if isinstance(text, str) and text.strip():
        return text
    refusal = getattr(message, "refusal", None)
    if isinstance(refusal, str) and refusal:
        raise ProviderError("provider_refused", f"OpenAI refuses: {refusal[:500]}")
    if choices and choices[0].finish_reason == "length":
        raise ProviderError("bad_answer", "OpenAI's model used up its tokens before it answered.")
    raise ProviderError("bad_answer", "OpenAI's answer holds no text.")


def _draw(client: openai.OpenAI, parameters: Mapping[str, Any]) -> str:
    answer = client.images.generate(**parameters)
    data = getattr(answer, "data", None) or ()
    text = getattr(data[0], "b64_json", None) if data else None
    if isinstance(text, str) and text:
        return text
    if data and getattr(data[0], "url", None):
        raise ProviderError("bad_answer", "OpenAI sent a link instead of the picture.")
    raise ProviderError("bad_answer", "OpenAI's answer holds no picture.")
