"""Limits client connections, in all and per address."""

from __future__ import annotations

from collections import Counter
from typing import Any

SHARE = 0.75
"""Part of all connections that one address may have. High, because all clients of a proxy share its address."""


class ConnectionLimits:
    """Allows `most` connections, and a share of them per address. A client is any object with `disconnect`.

    Without room for a new client, the one that has been idle or sending its request for longest is closed. A client
    that is being answered is never closed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._share = max(1, int(most * SHARE))
        self._addresses: dict[Any, str] = {}
        self._count: Counter[str] = Counter()
        self._waited_for: dict[str, dict[Any, None]] = {}
        """Clients whose request is awaited, by address, the longest wait first."""

    def admit(self, client: Any, address: str) -> bool:
        """Add a client and await its request; return False if there is no room for it."""
        if self._count[address] >= self._share:
            room = self._close_one(address)
        else:
            room = len(self._addresses) < self._most or self._close_one(self._crowded())
        if room:
            self._addresses[client] = address
            self._count[address] += 1
            self.wait_for(client)
        return room

    def remove(self, client: Any) -> None:
        """Remove a client whose connection has ended. May be called twice."""
        address = self._addresses.pop(client, None)
        if address is not None:
            self._count[address] -= 1
            self._stop_waiting(client, address)
            if not self._count[address]:
                del self._count[address]

    def wait_for(self, client: Any) -> None:
        """Record that the client's next request is awaited, so that it may be closed."""
        if client in self._addresses:
            self._waited_for.setdefault(self._addresses[client], {}).setdefault(client)

    def answer(self, client: Any) -> None:
        """Record that the client's whole request has arrived, so that it may not be closed."""
        if client in self._addresses:
            self._stop_waiting(client, self._addresses[client])

    def _stop_waiting(self, client: Any, address: str) -> None:
        waiting = self._waited_for.get(address, {})
        waiting.pop(client, None)
        if not waiting:
            self._waited_for.pop(address, None)

    def _crowded(self) -> str:
        """Return the address with the most connections among those with a client that may be closed; "" if none."""
        return max(self._waited_for, key=self._count.__getitem__, default="")

    def _close_one(self, address: str) -> bool:
        """Close the client of an address that has waited longest; return whether there was one."""
        client = next(iter(self._waited_for.get(address, ())), None)
        if client is None:
            return False
        self.remove(client)
        client.disconnect()
        return True
