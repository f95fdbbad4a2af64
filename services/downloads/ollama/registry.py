"""Fetches a model's manifest from its registry (OCI registry API v2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from services.cancellation import CancelToken
from services.downloads.fetcher import DownloadError
from services.downloads.hosts import host_key, host_key_of
from services.engines.ollama.names import DEFAULT_HOST, OllamaName
from services.http import FetchError, Redirects, TooLarge, fetch, is_loopback

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
MAX_BYTES = 4_000_000
"""Limit of a manifest, which has some hundred bytes per layer."""
TIMEOUT = 5.0
MAX_REDIRECTS = 3


@dataclass(frozen=True, slots=True)
class Manifest:
    """The layers of one version of a model.

    `digest` is the manifest's SHA-256 in hex, the id in `/api/tags`. `size_bytes` is the sum of all layers and the
    configuration; `layers` maps digests (`sha256:…`) to bytes.
    """

    digest: str
    size_bytes: int
    layers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Registries:
    """The registries that models may come from.

    `default_url` is for names without a host, `hosts` (`hf.co`, `registry.lan:5000`) are allowed in names; `insecure`
    connects to these without TLS.
    """

    default_url: str
    hosts: tuple[str, ...] = ()
    insecure: bool = False

    def origin(self, name: OllamaName) -> str:
        """Return the origin of a model's registry. No I/O. Raises DownloadError `registry_not_allowed`."""
        host = host_key(name.host)
        if host in (DEFAULT_HOST, host_key_of(self.default_url)):
            return self.default_url
        if host not in map(host_key, self.hosts):
            allowed = ", ".join((DEFAULT_HOST, *self.hosts))
            raise DownloadError(
                "registry_not_allowed",
                f"{name.host} is not one of the registries that models may come from: {allowed}. If you trust it, add"
                " it to the setting download_hosts.",
            )
        plain = self.insecure or is_loopback(name.host.partition(":")[0])
        return f"{'http' if plain else 'https'}://{name.host}"

    @property
    def is_ollamas(self) -> bool:
        """Whether names without a host are looked up in Ollama's own library."""
        return host_key_of(self.default_url) == DEFAULT_HOST

    def may_send_to(self, url: str) -> bool:
        """Return whether a registry may redirect to this URL."""
        return url.startswith("https:") and host_key_of(url) in map(host_key, self.hosts)


def fetch_manifest(
    name: OllamaName, registries: Registries, *, timeout: float = TIMEOUT, token: CancelToken | None = None
) -> Manifest:
    """Fetch a model's manifest.

    Raises DownloadError `registry_not_allowed`, `unknown_model`, `access_denied` or `registry_unreachable`, and
    Cancelled when `token` is cancelled.
    """
    origin = registries.origin(name)
    address = f"{origin}/v2/{name.namespace}/{name.model}/manifests/{name.tag}"
    try:
        answer = fetch(
            "GET",
            address,
            timeout=timeout,
            headers={"Accept": MANIFEST_TYPE},
            most_bytes=MAX_BYTES,
            redirects=Redirects(MAX_REDIRECTS, registries.may_send_to),
            token=token,
        )
    except TooLarge:
        raise _unreachable(name, f"{_host(origin)} answered, but with more than a manifest can hold") from None
    except FetchError as error:
        raise _unreachable(name, f"{_host(origin)} did not answer ({error})") from None
    if answer.status != 200:
        raise _refused(name, answer.status)
    try:
        return _manifest(answer.content)
    except ValueError as error:
        raise _unreachable(name, f"{_host(origin)} answered, but {error}") from None


def _host(origin: str) -> str:
    return urlsplit(origin).netloc


def _manifest(body: bytes) -> Manifest:
    try:
        said = json.loads(body)
        layers = {str(part["digest"]): int(part["size"]) for part in (said["config"], *said["layers"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("not with a manifest") from None
    if any(size < 0 for size in layers.values()):
        raise ValueError("not with a manifest")
    return Manifest(hashlib.sha256(body).hexdigest(), sum(layers.values()), layers)


def _refused(name: OllamaName, status: int) -> DownloadError:
    if status == 404:
        return DownloadError(
            "unknown_model",
            f"There is no model {name.short}: its registry doesn't know the name or the tag. Check the spelling, for"
            " example at https://ollama.com/library.",
        )
    if status in (401, 403):
        return DownloadError(
            "access_denied",
            f"The registry does not give {name.short} to everybody: it is private, needs an agreement, or does not"
            " exist. Check the name and your access to it.",
        )
    return _unreachable(name, f"it answered with status {status}")


def _unreachable(name: OllamaName, why: str) -> DownloadError:
    return DownloadError(
        "registry_unreachable",
        f"The registry of {name.short} could not be asked: {why}. Check the network, then try again.",
        may_resume=True,
    )
