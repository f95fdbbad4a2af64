"""Which hosts downloads may reach: those in the settings, and public ones.

Model names come from clients and redirects from registries. Neither may make this machine send requests to its own
services or those of its network.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443}


def host_key(netloc: str, scheme: str = "https") -> str:
    """Normalise a host for comparison, without the scheme's default port: `HF.co.:443` gives `hf.co`."""
    host, _, port = netloc.rpartition("@")[2].lower().rpartition(":")
    if not port.isdigit():  # no port, or the end of an IPv6 address
        host, port = netloc.rpartition("@")[2].lower(), ""
    host = host.rstrip(".")
    return f"{host}:{port}" if port and int(port) != PORTS.get(scheme) else host


def host_key_of(url: str) -> str:
    parts = urlsplit(url)
    return host_key(parts.netloc, parts.scheme)


def is_public(host: str) -> bool:
    """Return whether all addresses of a host are public: not loopback, private or reserved.

    Blocks during name resolution. An unknown name passes: without a proxy, it can't be reached either.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return all(_is_global(str(address[0])) for *_, address in found)


def _is_global(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    within = mapped or address
    return within.is_global and not within.is_multicast
