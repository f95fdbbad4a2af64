"""Parser of Ollama model names: `[host[:port]/][namespace/]model[:tag]`, as Ollama 0.24.0 reads and lists them.

Only parsed names are put into command arguments and URLs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
MAX_LENGTH = 300
OTHER_NAMES: Mapping[str, str] = {
    "capybarahermes-2.5-mistral-7b": "hf.co/TheBloke/CapybaraHermes-2.5-Mistral-7B-GGUF:Q4_0",
}
"""Names that people use although Ollama's library has no such model, and where that model is.

docs/decisions/0034-recommended-names.md says where that was looked up.
"""

_NAME = re.compile(
    r"""
    (?:(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]{0,252}(?P<port>:[0-9]{1,5})?)/)??
    (?:(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{0,79})/)?
    (?P<model>[A-Za-z0-9_][A-Za-z0-9._-]{0,79})
    (?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,79}))?
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class OllamaName:
    """A model, its tag, and its registry."""

    host: str
    """With the port, if any: `registry.ollama.ai`, `hf.co`, `127.0.0.1:5005`."""
    namespace: str
    model: str
    tag: str

    @staticmethod
    def parse(text: str) -> OllamaName:
        """Parse a name. Raises ValueError, with a message for people, if it is invalid."""
        if len(text) > MAX_LENGTH:
            raise ValueError(f"The name is {len(text)} characters long; Ollama's names have at most {MAX_LENGTH}.")
        found = _NAME.fullmatch(text)
        if found is None or ".." in text or (found["host"] and not _is_host(found["host"])):
            raise ValueError(
                f"{text!r} is not the name of an Ollama model. Write model or model:tag, with its owner or host in"
                " front where it has one, such as llama3.2, user/model:7b or hf.co/user/repository:Q4_K_M."
            )
        return OllamaName(
            found["host"] or DEFAULT_HOST,
            found["namespace"] or DEFAULT_NAMESPACE,
            found["model"],
            found["tag"] or DEFAULT_TAG,
        )

    @property
    def full(self) -> str:
        """The name as `/api/tags` lists it: defaults omitted, except the tag."""
        return f"{self._place}{self.model}:{self.tag}"

    @property
    def short(self) -> str:
        """The name as people write it: the tag `latest` is omitted too."""
        return self.full.removesuffix(f":{DEFAULT_TAG}")

    @property
    def _place(self) -> str:
        if self.host != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/"
        return "" if self.namespace == DEFAULT_NAMESPACE else f"{self.namespace}/"


def _is_host(text: str) -> bool:
    """Whether it can't be a namespace, which has neither dots nor a port."""
    host, _, port = text.partition(":")
    return bool(port and 0 < int(port) < 65_536) or (not port and ("." in host or host == "localhost"))


def full_name(text: str) -> str:
    """Return a name as `/api/tags` lists it: `llama3.2` becomes `llama3.2:latest`. Invalid names stay unchanged."""
    try:
        return OllamaName.parse(text).full
    except ValueError:
        return text


def library_name(text: str) -> str:
    """Return where a model is that people know by another name; other names stay unchanged."""
    return OTHER_NAMES.get(text.removesuffix(f":{DEFAULT_TAG}"), text)


def other_names(full: str) -> tuple[str, ...]:
    """Return the other names that people use for a model."""
    return tuple(name for name, known in OTHER_NAMES.items() if known == full)
