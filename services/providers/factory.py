"""Makes the providers of a job from the choice that holds when it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from services.config import Settings
from services.engines.openai.account import Account
from services.engines.port import Model
from services.engines.python_server.about import FLUX, VISION, VISION_MODEL, About
from services.engines.server_address import Address
from services.providers.adapters.local import FluxImage, LocalText, LocalVision
from services.providers.adapters.openai import OpenAIImage, OpenAIText, OpenAIVision
from services.providers.adapters.openai_api import OpenAIApi
from services.providers.adapters.upstream import CatalogModel, Gateway, RemoteServer, Upstream
from services.providers.ports import (
    Choice,
    ImageProvider,
    JobProviders,
    ProviderError,
    TextProvider,
    VisionProvider,
)
from services.switching.events import Snapshot

P = TypeVar("P")

TITLES = {"ollama": "Ollama", "vllm": "vLLM", "llamacpp": "The embedded engine", "local": "This machine"}


class ProviderFactory:
    """Makes providers. `account` is the settings' for OpenAI; what was learned of its models is shared by all jobs."""

    def __init__(self, settings: Settings, account: Account, gateway: Gateway) -> None:
        self._settings = settings
        self._gateway = gateway
        self._openai = OpenAIApi(account)

    def for_job(self, choice: Choice) -> JobProviders:
        """Return the providers of one job, each with the model that serves it from now on.

        No request is sent. Raises ProviderError if there is no model to serve one of them.
        """
        return JobProviders(self._text(choice.llm), self._image(choice.image), self._vision(choice.vision))

    def _text(self, provider: str) -> TextProvider:
        at_once = self._settings.studio_at_once
        if provider == "openai":
            return OpenAIText(self._openai, self._settings.openai_text_model, at_once)
        model = self._text_model(provider)
        return LocalText(provider, CatalogModel(self._gateway, model.id), model.id, self._at_once(model))

    def _image(self, provider: str) -> ImageProvider:
        if provider == "openai":
            return OpenAIImage(self._openai, self._settings.openai_image_model, self._settings.studio_at_once)
        settings = self._settings
        return self._served(FluxImage, "flux", FLUX, settings.flux_api_url, settings.flux_model)

    def _vision(self, provider: str) -> VisionProvider:
        if provider == "openai":
            return OpenAIVision(self._openai, self._settings.openai_vision_model, self._settings.studio_at_once)
        return self._served(LocalVision, "local", VISION, self._settings.local_vision_api_url, VISION_MODEL)

    def _served(
        self, make: Callable[[str, Upstream, str | None, int], P], name: str, about: About, url: str, default: str
    ) -> P:
        """Make a provider on a local server: through the gateway if its model is in the catalogue, else by its URL.

        Of several models the one that is or was loaded serves it, else the one called `default`.
        """
        catalog = self._gateway.catalog
        models = [m for m in catalog.models.values() if m.engine == about.name]
        if not models or not Address.parse(url).local:
            return make(name, RemoteServer(about.title, url), None, 1)
        usable = [m for m in models if m.fault is None]
        if not usable:
            raise ProviderError("provider_unavailable", f"{about.title} can't be used: {models[0].fault}")
        preferred = next((m for m in usable if m.id == catalog.id_of(default)), usable[0])
        model = _most_recent(usable, self._gateway.board.current) or preferred
        return make(name, CatalogModel(self._gateway, model.id), model.id, 1)

    def _text_model(self, provider: str) -> Model:
        """Return the model that serves a local provider of text: the setting's, else one that is or was loaded.

        Without any of these, the first that is installed.
        """
        catalog, snapshot = self._gateway.catalog, self._gateway.board.current
        usable = [
            m
            for m in catalog.models.values()
            if m.kind == "text" and m.fault is None and not m.remote and provider in ("local", m.engine)
        ]
        named = self._settings.ollama_model if provider == "ollama" else None
        preferred = catalog.id_of(named) if named is not None else None
        if preferred is None and provider == "local":
            preferred = snapshot.active_model
        chosen = next((m for m in usable if m.id == preferred), None) or _most_recent(usable, snapshot)
        if chosen is not None:
            return chosen
        if usable:
            return min(usable, key=lambda model: model.id)
        raise ProviderError(
            "provider_unavailable", f"{TITLES[provider]} has no model to write with. Download one first."
        )

    def _at_once(self, model: Model) -> int:
        """Return how many requests a model answers at once."""
        asked = self._settings.studio_at_once
        if model.engine != "llamacpp":
            return asked
        parallel = model.options.get("parallel")
        return min(asked, parallel if isinstance(parallel, int) else self._settings.parallel_requests)


def _most_recent(models: Iterable[Model], snapshot: Snapshot) -> Model | None:
    """Return the model that is loaded, the active one first, else the one used last; None if none ever was."""

    def rank(model: Model) -> tuple[bool, bool, float]:
        view = snapshot.instances.get(model.id)
        used = (view.traffic.last_used or view.loaded_at if view else snapshot.last_used.get(model.id)) or 0.0
        return model.id == snapshot.active_model, view is not None, used

    best = max(models, key=rank, default=None)
    return best if best is not None and rank(best) > (False, False, 0.0) else None
