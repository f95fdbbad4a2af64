"""Whether a provider can serve a capability now, asked when somebody chooses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.engines.port import Model
from services.providers.docker_service import DockerStatus
from services.providers.health import HealthChecks
from services.providers.local_services import ServiceName
from services.providers.openai_key import OpenAIKey
from services.providers.ports import Capability
from services.providers.selection import Problem

SERVICES: Mapping[tuple[Capability, str], ServiceName] = {
    ("llm", "ollama"): "ollama",
    ("image", "flux"): "flux",
    ("vision", "local"): "vision",
}
"""The providers that a local service stands behind."""
TITLES: Mapping[ServiceName, str] = {"ollama": "Ollama", "flux": "Flux", "vision": "Local vision"}


class Availability:
    """Finds out what keeps a provider from serving.

    `models` are the catalogue's; `docker` checks Docker now. Both block for a bounded time only.
    """

    def __init__(
        self,
        health: HealthChecks,
        openai: OpenAIKey,
        models: Callable[[], Mapping[str, Model]],
        docker: Callable[[], DockerStatus],
    ) -> None:
        self._health = health
        self._openai = openai
        self._models = models
        self._docker = docker

    def problem(self, capability: Capability, provider: str) -> Problem | None:
        """Return what is wrong, None if it can serve."""
        service = SERVICES.get((capability, provider))
        if service is not None:
            return self._service_problem(capability, provider, service)
        if provider == "openai":
            return self._key_problem(capability)
        return self._model_problem(provider)

    def _service_problem(self, capability: Capability, provider: str, service: ServiceName) -> Problem | None:
        found = self._health.check(service)
        if found.available:
            return None
        title = TITLES[service]
        why = "" if found.refused or found.error is None else f" {found.error}"
        guidance = f"Start {title} service before switching.{why}"
        return Problem(capability, provider, f"{title} service not available", guidance, service)

    def _key_problem(self, capability: Capability) -> Problem | None:
        """Only a refusal counts: a network that is down for a moment must not keep anybody from choosing."""
        check = self._openai.check()
        if check is None:
            return Problem(
                capability,
                "openai",
                "OpenAI not available: it needs a key",
                "Set openai_api_key in switchyard.toml, or OPENAI_API_KEY in the environment, then restart Switchyard.",
            )
        if check.answer != "refused":
            return None
        guidance = f"{check.error} Correct the setting openai_api_key (OPENAI_API_KEY), then restart Switchyard."
        return Problem(capability, "openai", "OpenAI not available", guidance)

    def _model_problem(self, engine: str) -> Problem | None:
        """Check an engine of text models; `local` is any of this machine's."""
        models = [m for m in self._models().values() if m.kind == "text" and m.fault is None]
        if not any(m.engine == engine or (engine == "local" and m.engine != "openai") for m in models):
            return Problem("llm", engine, *_NO_MODEL[engine])
        if engine != "vllm":
            return None
        docker = self._docker()
        if docker.state == "running":
            return None
        return Problem("llm", engine, "vLLM not available", docker.error or "Start Docker, which runs it, then switch.")


_NO_MODEL: Mapping[str, tuple[str, str]] = {
    "local": ("No local model is available", "Download one on the Models page, then switch."),
    "llamacpp": (
        "The embedded engine has no model",
        "Put a GGUF file into the models folder, or download one on the Models page, then switch.",
    ),
    "vllm": ("vLLM has no model", 'List one in switchyard.toml with engine = "vllm", then restart Switchyard.'),
}
