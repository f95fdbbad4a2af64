"""Schemas of a listed model's `options`, by engine; checked when the settings are read.

The engines' adapters document what each option does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from services.redaction import is_secret, shown

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
"""A process argument or environment value: it can't contain NUL."""
Argument = Text | int | float
Tokens = Annotated[int, Field(ge=128, le=16_777_216)]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
BASE_URL = r"^https?://[A-Za-z0-9._\-\[\]:]+(/[A-Za-z0-9._~%+-]+)*/?$"


def _base_url(value: str) -> str:
    """Return an API's address without a slash at its end. Raises ValueError."""
    try:
        usable = bool(urlsplit(value).hostname) and (urlsplit(value).port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be an address such as https://host/v1")
    return value.rstrip("/")


BaseUrl = Annotated[str, StringConstraints(pattern=BASE_URL, max_length=2000), AfterValidator(_base_url)]
"""An address without user, password and query: pages show it."""
FolderPath = Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$", max_length=4096)]


class LlamaCppOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    context_length: Tokens | None = None
    parallel: Annotated[int, Field(ge=1, le=256)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    device: Text | None = None
    arguments: list[Argument] = []


class OllamaOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    context_length: Tokens | None = None
    device: Text | None = None


class VllmOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]{0,254}$")] | None = None
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")] | None = None
    arguments: list[Argument] = []
    environment: dict[VariableName, Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")] | int | float | bool] = {}
    context_length: Tokens | None = None
    device: Text | None = None
    shm_gb: Annotated[float, Field(gt=0, le=1024)] | None = None
    mounts: list[Annotated[list[FolderPath], Field(min_length=2, max_length=2)]] = []
    sleep: bool | None = None


class PythonServerOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    device: Text | None = None
    arguments: list[Argument] = []
    environment: dict[VariableName, Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")] | int | float | bool] = {}


class OpenAIOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    base_url: BaseUrl | None = None
    key_env: VariableName | None = None


OPTIONS: Mapping[str, type[BaseModel]] = {
    "llamacpp": LlamaCppOptions,
    "ollama": OllamaOptions,
    "vllm": VllmOptions,
    "flux": PythonServerOptions,
    "vision": PythonServerOptions,
    "openai": OpenAIOptions,
}

OFTEN_SECRET = {"arguments", "environment"}
"""Options that pass keys and tokens on to an engine: errors name them without their values."""


def validate_options(engine: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options with their types. Raises ValueError naming what is wrong and what is allowed."""
    known = OPTIONS[engine]
    try:
        return known.model_validate(options).model_dump(exclude_unset=True)
    except ValidationError as error:
        # A value with several allowed types has one error per type: the first is enough.
        problems = {str(problem["loc"][0]): _describe(problem, engine, known) for problem in reversed(error.errors())}
        raise ValueError("; ".join(reversed(problems.values()))) from None


def _describe(problem: Any, engine: str, known: type[BaseModel]) -> str:
    name, *within = (str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"there is no option {name!r} for {engine} models, only {', '.join(sorted(known.model_fields))}"
    entry = f" {within[0]}" if within else ""
    message = str(problem["msg"])
    secret = name in OFTEN_SECRET or is_secret(known, [name])
    return f"the option {name}{entry}: {message[0].lower()}{message[1:]}{shown(problem['input'], secret=secret)}"
