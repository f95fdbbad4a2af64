"""Restricts where Hugging Face may redirect downloads to. Imported by the child process only.

Hugging Face answers a request for a file with a redirect to its CDN, a public host over HTTPS with a signed URL, and
for a renamed repository with a redirect to itself. All other redirects are refused before a request is sent.
"""

from __future__ import annotations

from collections.abc import Iterable

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from services.downloads.fetcher import DownloadError
from services.downloads.hosts import host_key, host_key_of, is_public

BLOB = {"blob": True}
"""`extensions` of a request for a file, which may end at the CDN; redirects inherit them."""


def guard_redirects(hosts: Iterable[str]) -> None:
    """Let huggingface_hub send requests only to its endpoint, to `hosts` and, for files, to its CDN."""
    guard = RedirectGuard(constants.ENDPOINT, hosts)

    def make() -> httpx2.Client:
        client = default_client_factory()
        client.event_hooks["request"].append(guard)
        return client

    set_client_factory(make)


class RedirectGuard:
    """Hook called before each request, redirected ones included."""

    def __init__(self, endpoint: str, hosts: Iterable[str]) -> None:
        self._hub = host_key_of(endpoint)
        self._secure = endpoint.startswith("https:")
        self._hosts = frozenset(host_key(host) for host in hosts)

    def __call__(self, request: httpx2.Request) -> None:
        """Check a request. Raises DownloadError `redirect_refused`."""
        url = request.url
        where = host_key(url.netloc.decode("ascii"), url.scheme)
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
