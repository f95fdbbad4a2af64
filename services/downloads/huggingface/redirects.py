"""Where the Hugging Face hub may send a download on. Imported by the child process alone.

The hub answers for a file with a redirect to its CDN, a public host over HTTPS whose address carries a signature of its
own, and for a renamed repository with one to itself. Everything else is refused before it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from services.downloads.fetcher import DownloadError
from services.downloads.hosts import is_public, place, place_of

BLOB = {"blob": True}
"""The `extensions` of a request for a file, which may end at the CDN; redirects inherit them."""


def watch_redirects(hosts: Iterable[str]) -> None:
    """Have huggingface_hub send nothing to other places than its endpoint, `hosts` and, for files, its CDN."""
    guard = Guard(constants.ENDPOINT, hosts)

    def make() -> httpx2.Client:
        client = default_client_factory()
        client.event_hooks["request"].append(guard)
        return client

    set_client_factory(make)


class Guard:
    """Told of each request before it goes out, redirected ones included."""

    def __init__(self, endpoint: str, hosts: Iterable[str]) -> None:
        self._hub = place_of(endpoint)
        self._secure = endpoint.startswith("https:")
        self._hosts = frozenset(place(host) for host in hosts)

    def __call__(self, request: httpx2.Request) -> None:
        """Raises DownloadError `redirect_refused`."""
        url = request.url
        where = place(url.netloc.decode("ascii"), url.scheme)
        if where == self._hub and (url.scheme == "https" or not self._secure):
            return
        request.headers.pop("Authorization", None)
        if where in self._hosts:
            return
        if request.extensions.get("blob") and url.scheme == "https" and is_public(url.host):
            return
        raise DownloadError(
            "redirect_refused",
            f"{self._hub} sends this download on to {url.scheme}://{where}, which is not asked. If that is where your "
            "hub keeps its files, add it to the setting download_hosts.",
        )
