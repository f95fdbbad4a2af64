"""Where downloads may go: hosts that the settings name, and public ones.

A model's name comes from whoever can reach the page, and a redirect from whoever runs a registry: neither may have this
machine ask its own services, or those of its network, what nobody meant it to ask.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443}


def place(netloc: str, scheme: str = "https") -> str:
    """A host, with its port unless that is the scheme's own, to be compared: `HF.co.:443` is `hf.co`."""
    host, _, port = netloc.rpartition("@")[2].lower().rpartition(":")
    if not port.isdigit():  # no port, or the end of an IPv6 address
        host, port = netloc.rpartition("@")[2].lower(), ""
    host = host.rstrip(".")
    return f"{host}:{port}" if port and int(port) != PORTS.get(scheme) else host


def place_of(url: str) -> str:
    parts = urlsplit(url)
    return place(parts.netloc, parts.scheme)


def is_public(host: str) -> bool:
    """Whether all addresses of a host are on the Internet: not this machine's, its network's, or set aside.

    Blocks while the name is looked up. One that nobody knows passes: it can't be reached without a proxy either.
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
