"""The interfaces of those who serve text, images and vision to a job, and the values that cross them.

Adapters are blocking code. Each call takes the job's cancellation token, and raises Cancelled soon after it is
cancelled; the request upstream has ended then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict, get_args

from services.cancellation import CancelToken

Capability = Literal["llm", "image", "vision"]
TextName = Literal["openai", "ollama", "vllm", "llamacpp", "local"]
ImageName = Literal["openai", "flux"]
VisionName = Literal["openai", "local"]
PROVIDERS: Mapping[Capability, tuple[str, ...]] = {
    "llm": get_args(TextName),
    "image": get_args(ImageName),
    "vision": get_args(VisionName),
}
IMAGE_ALIASES: Mapping[str, ImageName] = {"dalle": "openai"}
VISION_ALIASES: Mapping[str, VisionName] = {"gpt-vision": "openai"}
ALIASES: Mapping[Capability, Mapping[str, str]] = {"llm": {}, "image": IMAGE_ALIASES, "vision": VISION_ALIASES}
"""Other names of providers, accepted in the settings and by a switch."""


class ChatMessage(TypedDict):
    """One message in the form of OpenAI's chat API."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Who serves each capability: the names of providers, without aliases.

    `llm`: openai, ollama, vllm, llamacpp or local (whatever model is active). `image`: openai or flux. `vision`: openai
    or local.
    """

    llm: str
    image: str
    vision: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file: its bytes and media type (`image/png`, `image/jpeg`, `image/webp`)."""

    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class Score:
    """How well a picture shows a prompt (`alignment`) and how it looks (`aesthetic`), and both as one: 0 to 1 each.

    `comment` says why, in the scorer's words; empty if it gives none.
    """

    alignment: float
    aesthetic: float
    total: float
    comment: str = ""


class ProviderError(Exception):
    """A provider could not do what was asked. The text is for people, in the provider's own words where it has some.

    `code` is for programs: provider_unavailable, provider_refused, rate_limited, out_of_memory, bad_answer.
    `retry_after` is seconds, set if the same request may succeed then.
    """

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


class Provider(Protocol):
    """What every provider has in common."""

    @property
    def name(self) -> str:
        """The provider's name in a `Choice`."""

    @property
    def model(self) -> str | None:
        """The model that serves it; None if the provider decides."""

    @property
    def at_once(self) -> int:
        """How many calls it may be given side by side."""

    def make_ready(self, token: CancelToken) -> float:
        """Block until it can be called, switching to its model if it is one of ours; return the seconds that took.

        0 if nothing had to be done. Raises ProviderError and Cancelled.
        """


class TextProvider(Provider, Protocol):
    """Writes text."""

    def complete(
        self,
        messages: Sequence[ChatMessage],
        token: CancelToken,
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> str:
        """Return the model's answer. Raises ProviderError and Cancelled."""


class ImageProvider(Provider, Protocol):
    """Draws pictures."""

    def generate(self, prompt: str, token: CancelToken, *, width: int, height: int, seed: int | None) -> Picture:
        """Return a picture of about that size, in pixels. Raises ProviderError and Cancelled."""


class VisionProvider(Provider, Protocol):
    """Judges pictures."""

    def score(self, picture: Picture, prompt: str, token: CancelToken) -> Score:
        """Return how well the picture shows the prompt. Raises ProviderError (bad_answer for a NaN) and Cancelled."""


@dataclass(frozen=True, slots=True)
class JobProviders:
    """The providers of one job, fixed when it starts."""

    llm: TextProvider
    image: ImageProvider
    vision: VisionProvider

    def names(self) -> Mapping[Capability, Mapping[str, str | None]]:
        """Return each capability's provider and model."""
        return {
            "llm": {"provider": self.llm.name, "model": self.llm.model},
            "image": {"provider": self.image.name, "model": self.image.model},
            "vision": {"provider": self.vision.name, "model": self.vision.model},
        }
