"""Who may hold a connection: room for the next client, and for every address."""

from __future__ import annotations

from collections import Counter
from typing import Any

SHARE = 0.75
"""The part of all connections that one address may have: a proxy, or the browsers of this machine, have them all."""


class ConnectionLimits:
    """At most `most` connections, and of those a share per address. Clients are anything with `hang_up`.

    Where there is no room for a new client, the one is closed that has been idle, or in the middle of sending its
    request, for longest. One that is being answered is never closed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._share = max(1, int(most * SHARE))
        self._addresses: dict[Any, str] = {}
        self._count: Counter[str] = Counter()
        self._waited_for: dict[str, dict[Any, None]] = {}
        """By address, the clients whose request is being waited for, the one waited for longest first."""

    def admit(self, client: Any, address: str) -> bool:
        """Count a new client in, and wait for its request; False when there is no room for it."""
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
        """A client has gone. May be called twice."""
        address = self._addresses.pop(client, None)
        if address is not None:
            self._count[address] -= 1
            self._stop_waiting(client, address)
            if not self._count[address]:
                del self._count[address]

    def wait_for(self, client: Any) -> None:
        """It is the client's turn to send a request."""
        if client in self._addresses:
            self._waited_for.setdefault(self._addresses[client], {}).setdefault(client)

    def answer(self, client: Any) -> None:
        """The client's whole request has arrived."""
        if client in self._addresses:
            self._stop_waiting(client, self._addresses[client])

    def _stop_waiting(self, client: Any, address: str) -> None:
        waiting = self._waited_for.get(address, {})
        waiting.pop(client, None)
        if not waiting:
            self._waited_for.pop(address, None)

    def _crowded(self) -> str:
        """The address with the most connections, of those with a client whose request is being waited for."""
        return max(self._waited_for, key=self._count.__getitem__, default="")

    def _close_one(self, address: str) -> bool:
        """Close one of an address's clients. Whether that was possible."""
        client = next(iter(self._waited_for.get(address, ())), None)
        if client is None:
            return False
        self.remove(client)
        client.hang_up()
        return True
