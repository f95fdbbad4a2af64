"""Where a remote model answers and with which key: pure rules over its options, the settings and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from services.engines.port import Endpoint, Model


@dataclass(frozen=True, slots=True)
class Account:
    """An address with its key: an API's base URL, such as `https://host/api/v1`, without a slash at its end.

    `key` is None where there is none to send.
    """

    base_url: str
    key: str | None = field(default=None, repr=False)

    def endpoint(self, model: str) -> Endpoint:
        """Return where requests for the upstream model `model` go."""
        parts = urlsplit(self.base_url)
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return Endpoint(f"{parts.scheme}://{parts.netloc}", headers, model, base_path=parts.path)


class NoKey(Exception):
    """A model's key is not set. The text says which one, and where."""


def account_of(model: Model, default: Account, environ: Mapping[str, str]) -> Account:
    """Return a model's account: its own address and key where its options name them, else the settings'.

    The settings' key is never sent to another host than the settings' own. Raises NoKey.
    """
    base_url = str(model.options.get("base_url") or default.base_url)
    variable = model.options.get("key_env")
    if isinstance(variable, str):
        key = environ.get(variable, "").strip()
        if not key:
            raise NoKey(f"The environment variable {variable}, which its option key_env names, is not set.")
        return Account(base_url, key)
    if urlsplit(base_url)[:2] != urlsplit(default.base_url)[:2]:
        return Account(base_url)
    if default.key is None:
        raise NoKey("There is no key for it. Set OPENAI_API_KEY, or name another variable in its option key_env.")
    return Account(base_url, default.key)
