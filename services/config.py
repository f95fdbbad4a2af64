"""Typed settings: `switchyard.toml`, overridden by `SWITCHYARD_*` environment variables.

An invalid key or value stops the start with a message that names the key, its source and what is allowed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from services.engines.options import validate_options
from services.engines.port import Kind
from services.model_ids import check_model_id
from services.providers.ports import IMAGE_ALIASES, VISION_ALIASES, ImageName, TextName, VisionName
from services.redaction import is_secret, shown, without_credentials

PREFIX = "SWITCHYARD_"
DEFAULT_FILE = "switchyard.toml"
KEY = re.compile(r"[!-~]{1,1000}")
URL_PATH = re.compile(r"(/[A-Za-z0-9._~%+-]+)*")
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?(:\d{1,5})?")

Strategy = Literal["largest_first", "oldest_first", "preserve_favorites", "cheapest_reload"]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ConfigError(Exception):
    """The settings are invalid. The text lists every problem, one per line."""


ModelId = Annotated[str, AfterValidator(check_model_id)]
ModelIds = Annotated[tuple[ModelId, ...], Field(max_length=1000)]


class ModelEntry(BaseModel):
    """One `[[models]]` table of the settings file."""

    model_config = ConfigDict(extra="forbid")

    id: ModelId
    engine: Literal["llamacpp", "ollama", "vllm", "flux", "vision", "openai"] = "llamacpp"
    source: Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$", max_length=4096)]
    kind: Kind = "text"
    description: str = ""
    size_gb: Annotated[float, Field(gt=0)] | None = None
    required_gb: Annotated[float, Field(gt=0)] | None = None
    load_time_seconds: Seconds | None = None
    tags: tuple[str, ...] = ()
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _no_memory_elsewhere(self) -> ModelEntry:
        sizes = (self.size_gb, self.required_gb, self.load_time_seconds)
        if self.engine == "openai" and any(size is not None for size in sizes):
            raise ValueError("an openai model is not loaded here: leave out size_gb, required_gb and load_time_seconds")
        return self

    @field_validator("options")
    @classmethod
    def _known_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        engine = info.data.get("engine")
        return value if engine is None else validate_options(engine, value)  # None: the engine itself is invalid


class Recommendation(BaseModel):
    """One `[[recommended]]` table of the settings file: a model that pages recommend."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=300)]
    source: Literal["ollama", "huggingface"] = "ollama"
    description: str = ""
    size_gb: Annotated[float, Field(gt=0)] | None = None
    recommended: bool = False


SEED_RECOMMENDATIONS = (
    Recommendation(
        model="hf.co/TheBloke/CapybaraHermes-2.5-Mistral-7B-GGUF:Q4_0",
        description="Fast 7B model, good for prompt refinement",
        size_gb=4.1,
        recommended=True,
    ),
    Recommendation(model="llama3.2", description="Latest Llama 3.2, general purpose", size_gb=2.0),
    Recommendation(model="mistral", description="Balanced speed and quality", size_gb=4.1),
)
"""Used without `[[recommended]]` tables."""


class Preferences(BaseModel):
    """What people may change while the app runs; the settings give the defaults. Times are seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy = Field("largest_first", description="which models a switch unloads first")
    auto_unload: bool = Field(True, description="whether a switch may unload other models to make room")
    confirm_before_unload: bool = Field(False, description="whether a switch that unloads must be confirmed")
    preserve_models: ModelIds = Field((), description="models that no switch ever unloads, whatever the strategy")
    favorites: ModelIds = Field((), description="models listed first, and kept by the strategy preserve_favorites")
    switch_on_request: bool = Field(True, description="whether asking a model that is not loaded switches to it")
    preload: ModelIds = Field((), description="models to load when the app starts, as far as they fit")
    last_used: bool = Field(False, description="whether to load the last active model when the app starts")
    idle_unload_seconds: Seconds | None = Field(
        None, description="how long a model may be unused before it is unloaded"
    )
    idle_unload_models: Mapping[ModelId, Annotated[float, Field(ge=0, le=86_400)]] = Field(
        {}, description="idle_unload_seconds for single models; 0: never"
    )
    keep_at_least_one: bool = Field(True, description="whether the last loaded model stays, however long it is unused")
    home_model: ModelId | None = Field(None, description="model to go back to when the active one is unused")
    home_after_seconds: Seconds = Field(300, description="how long the active model must be unused for that")

    @field_validator("preserve_models", "favorites", "preload", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        """A single id is a list of one: `preload` was one model once."""
        return (value,) if isinstance(value, str) else value


class Settings(Preferences):
    """All settings with defaults and bounds. Times are seconds, `_gb` figures decimal gigabytes."""

    model_config = ConfigDict(extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; loopback only in this version")
    port: int = Field(8787, ge=1, le=65_535, description="port to listen on")
    allowed_hosts: tuple[str, ...] = Field((), description="further host names that requests may ask for")
    state_dir: Path = Field(Path("state"), description="folder for the database, logs and the lock")
    models_dir: Path = Field(Path("models"), description="folder whose GGUF files join the catalogue by themselves")
    memory_budget_gb: float | None = Field(None, gt=0, description="caps the system memory that models may use")

    drain_timeout_seconds: Seconds = Field(30, description="how long requests in flight may finish before an unload")
    unload_timeout_seconds: Seconds = Field(15, description="how long an engine may take to stop before it is killed")
    sleep_timeout_seconds: Seconds = Field(120, description="how long a model may take to fall asleep")
    memory_timeout_seconds: Seconds = Field(20, description="how long to wait until freed memory measures free")
    load_timeout_seconds: Seconds = Field(1800, description="how long a load may take")
    warm_up_timeout_seconds: Seconds = Field(120, description="how long the first token may take")

    queue_limit: int = Field(64, ge=0, le=10_000, description="requests that may wait for a model at once")
    queue_timeout_seconds: Seconds = Field(600, description="how long a request waits for its model")
    upstream_timeout_seconds: Seconds = Field(600, description="how long an engine may be silent in an answer")
    unresponsive_seconds: float = Field(
        120, ge=0, le=86_400, description="silence of a model at work after which it is restarted; 0: never"
    )
    max_body_mb: float = Field(8, gt=0, le=1024, description="largest request body")
    switch_rate_limit: str = Field(
        "600/minute",
        pattern=r"^[1-9]\d{0,5} ?(/|per) ?(second|minute|hour|day)$",
        description="switches allowed per client, such as 60/minute",
    )

    llamacpp_server: str | None = Field(None, description="a native llama-server to run instead of the embedded one")
    context_length: int = Field(
        4096, ge=128, le=1_048_576, description="default context of an embedded model, in tokens"
    )
    parallel_requests: int = Field(4, ge=1, le=256, description="requests an embedded model answers at once")
    standby: bool = Field(True, description="keep one empty engine process ready, so that a switch starts sooner")

    ollama_base_url: str = Field("http://127.0.0.1:11434", description="where Ollama answers, here or elsewhere")
    ollama_model: str | None = Field(None, description="Ollama model that answers when nothing is loaded")
    ollama_binary: str | None = Field(None, description="the ollama program; default: the one on PATH")
    ollama_context_length: int | None = Field(
        None,
        ge=128,
        le=1_048_576,
        description="context of Ollama models, in tokens; default: context_length, or the server's own",
    )
    ollama_registry_url: str = Field("https://registry.ollama.ai", description="where Ollama models come from")
    download_hosts: tuple[str, ...] = Field(
        ("hf.co", "huggingface.co"),
        description="further registries that a model's name may point to, and that a hub may send downloads on to",
    )
    ollama_insecure_registry: bool = Field(False, description="let Ollama pull from registries without TLS")

    docker_host: str | None = Field(None, description="where Docker answers; default: its usual socket")
    vllm_image: str = Field(
        "vllm/vllm-openai:latest",
        pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]{0,254}$",
        description="the image that vLLM models run in",
    )
    vllm_cache_dir: Path = Field(Path("~/.cache/vllm"), description="folder for what vLLM compiles, kept between loads")
    vllm_sleep: bool = Field(
        True, description="let vLLM models on GPUs sleep in this machine's RAM instead of being stopped"
    )
    vllm_shm_gb: float = Field(8, gt=0, le=1024, description="shared memory of a vLLM container")
    hub_cache_dir: Path = Field(
        Path("~/.cache/huggingface"), description="the Hugging Face cache that vLLM containers load weights from"
    )

    env_file: Path | None = Field(
        None, description="a compose project's .env file, where /api/switch-model writes the model it switches to"
    )
    env_key: str = Field("MODEL_ID", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$", description="the variable for it there")

    llm_provider: TextName = Field("openai", description="who writes text for the Studio; local: the active model")
    image_provider: ImageName = Field("openai", description="who draws pictures for the Studio")
    vision_provider: VisionName = Field("openai", description="who judges pictures for the Studio")
    remember_providers: bool = Field(False, description="whether a choice of providers outlasts a restart")
    openai_api_key: SecretStr | None = Field(None, description="the key for OpenAI, or for what answers in its place")
    openai_base_url: str = Field("https://api.openai.com/v1", description="where OpenAI's API answers")
    openai_text_model: str = Field(
        "gpt-5", min_length=1, max_length=200, description="OpenAI's model that writes text for the Studio"
    )
    openai_image_model: str = Field(
        "gpt-image-1", min_length=1, max_length=200, description="OpenAI's model that draws pictures for the Studio"
    )
    openai_vision_model: str = Field(
        "gpt-5", min_length=1, max_length=200, description="OpenAI's model that judges pictures for the Studio"
    )
    flux_api_url: str = Field("http://127.0.0.1:8001", description="where the Flux service answers")
    flux_model: str = Field(
        "flux-schnell",
        pattern=r"^[^\x00-\x1f-][^\x00-\x1f]*$",
        max_length=500,
        description="the model that the Flux service draws with: a name at Hugging Face, or a folder",
    )
    local_servers_dir: Path | None = Field(
        None, description="folder of the Flux and vision services' programs; default: the app's own"
    )
    local_servers_env: Path | None = Field(
        None, description="their virtual environment; default: local-servers-env in the state folder"
    )
    local_vision_api_url: str = Field("http://127.0.0.1:8002", description="where the vision service answers")
    studio_at_once: int = Field(4, ge=1, le=64, description="calls that a Studio run makes to one provider at once")
    studio_pictures_gb: float = Field(
        2, gt=0, le=10_000, description="disk space for the Studio's pictures; the oldest are removed first"
    )
    environment: Literal["local", "production"] | None = Field(
        None, description="whether pages manage models; default: local where they are asked from this machine"
    )

    update_check_hours: float = Field(
        24, ge=0, le=8760, description="how often to ask the registry for newer versions of Ollama models; 0: never"
    )
    downloads_at_once: int = Field(2, ge=1, le=16, description="downloads that run side by side")
    disk_margin_gb: float = Field(1, ge=0, description="disk space that downloads leave free")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")
    models: tuple[ModelEntry, ...] = Field((), description="listed models, as [[models]] tables of the file")
    recommended: tuple[Recommendation, ...] = Field(
        SEED_RECOMMENDATIONS, description="models to recommend, as [[recommended]] tables of the file"
    )

    @field_validator("host")
    @classmethod
    def _loopback_only(cls, value: str) -> str:
        if value == "localhost":
            return value
        try:
            loopback = ipaddress.ip_address(value).is_loopback
        except ValueError:
            raise ValueError("must be an IP address, such as 127.0.0.1") from None
        if not loopback:
            raise ValueError("must be a loopback address: anyone who reaches another one could switch models")
        return value

    @field_validator("image_provider", mode="before")
    @classmethod
    def _image_alias(cls, value: object) -> object:
        return IMAGE_ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("vision_provider", mode="before")
    @classmethod
    def _vision_alias(cls, value: object) -> object:
        return VISION_ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("openai_api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not KEY.fullmatch(key):
            raise ValueError("must be 1 to 1000 ASCII characters without spaces")
        return SecretStr(key)

    @field_validator(
        "ollama_base_url", "ollama_registry_url", "openai_base_url", "flux_api_url", "local_vision_api_url"
    )
    @classmethod
    def _an_address(cls, value: str, info: ValidationInfo) -> str:
        """Only OpenAI's address may have a path."""
        parts = urlsplit(value if "://" in value else f"http://{value}")
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        path = parts.path.rstrip("/")
        unwanted = parts.query or parts.fragment or "@" in parts.netloc or not URL_PATH.fullmatch(path)
        if not usable or unwanted or (path and info.field_name != "openai_base_url"):
            example = cls.model_fields[info.field_name or ""].default
            raise ValueError(f"must be an address such as {example}, without user, password or query")
        return f"{parts.scheme}://{parts.netloc}{path}"

    @field_validator("download_hosts")
    @classmethod
    def _hosts(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not HOST.fullmatch(value):
                raise ValueError(f"{without_credentials(value)} is not a host, such as hf.co or registry.lan:5000")
        return values

    @model_validator(mode="after")
    def _ids_once(self) -> Settings:
        ids = [entry.id for entry in self.models]
        twice = {i for i in ids if ids.count(i) > 1}
        if twice:
            raise ValueError(f"models: the id {', '.join(sorted(twice))} is listed more than once")
        return self

    @property
    def preferences(self) -> Preferences:
        """The defaults of what can be changed at run time."""
        return Preferences.model_validate({name: getattr(self, name) for name in Preferences.model_fields})

    @property
    def memory_budget_bytes(self) -> int | None:
        return None if self.memory_budget_gb is None else int(self.memory_budget_gb * 1e9)

    @property
    def disk_margin_bytes(self) -> int:
        return int(self.disk_margin_gb * 1e9)

    @property
    def studio_pictures_bytes(self) -> int:
        return int(self.studio_pictures_gb * 1e9)

    @property
    def longest_switch_seconds(self) -> float:
        """Upper bound of a switch's duration, rollback included."""
        one = self.drain_timeout_seconds + 2 * self.unload_timeout_seconds + 2 * self.memory_timeout_seconds
        one += self.sleep_timeout_seconds
        return 2 * (one + self.load_timeout_seconds + self.warm_up_timeout_seconds)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)


LIST_KEYS = {"allowed_hosts", "preserve_models", "favorites", "preload", "download_hosts"}
FILE_ONLY = {"models", "recommended"}
UNPREFIXED = {
    name: name.lower()
    for name in (
        "OLLAMA_BASE_URL",
        "OLLAMA_MODEL",
        "DOCKER_HOST",
        "LLM_PROVIDER",
        "IMAGE_PROVIDER",
        "VISION_PROVIDER",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "FLUX_API_URL",
        "FLUX_MODEL",
        "LOCAL_VISION_API_URL",
    )
}
"""Variables that other programs read too; the prefixed ones win."""


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings file, then the environment; `overrides` win over both.

    The file is named by `SWITCHYARD_CONFIG`; the default is `switchyard.toml` if it exists. Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(f"{PREFIX}CONFIG")
    path = Path(named or DEFAULT_FILE)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if named or path.is_file():
        values = _read_file(path)
        origin = {key: str(path) for key in values}
    for key, value, name in _from_environment(environ):
        values[key] = value
        origin[key] = f"the environment ({name})"
    values.update(overrides)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"The settings file {path} (named by {PREFIX}CONFIG) does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} can't be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The settings file {path} is not valid TOML: {error}.") from None


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and variable name; prefixed variables last, so that they win."""
    for name, key in UNPREFIXED.items():
        if environ.get(name):
            yield key, environ[name], name
    for name, value in environ.items():
        key = name.removeprefix(PREFIX).lower()
        if not name.startswith(PREFIX) or key == "config":
            continue
        if key in FILE_ONLY:
            raise ConfigError(f"{name}: {key} are listed in the settings file, as [[{key}]] tables.")
        if key in LIST_KEYS:
            yield key, tuple(part.strip() for part in value.split(",") if part.strip()), name
        elif value != "":
            yield key, value, name


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    lines = ["The settings can't be used:"]
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location) or "settings"
        where = origin.get(location[0], "the defaults") if location else "the settings file"
        lines.append(f"  {key}, in {where}: {_describe(problem, location)}")
    return "\n".join(lines)


def _describe(problem: Any, location: list[str]) -> str:
    if problem["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"models": ModelEntry, "recommended": Recommendation}
        known = tables.get(location[0], Settings)
        return f"there is no such setting. Allowed: {', '.join(sorted(known.model_fields))}."
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}{shown(problem.get('input'), secret=is_secret(Settings, location))}."
