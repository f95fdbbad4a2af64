"""Streamed responses of Docker that can be closed while another thread reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import urllib3

from services.engines.containers.docker_client import Client

T = TypeVar("T")


class DockerStream(Generic[T]):
    """The items of a streamed response. Owns `client`, which streams nothing else, and closes it at the end.

    `lost` creates the error that `next` raises when the connection breaks; without it the iteration just ends. A gap
    longer than the client's limit raises TimeoutError or urllib3's.
    """

    def __init__(self, client: Client, items: Iterator[T], *, lost: Callable[[], Exception] | None = None) -> None:
        self._client = client
        self._items = items
        self._lost = lost
        self._lock = threading.Lock()
        self._reading = False
        self._over = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            if self._over:
                raise StopIteration
            self._reading = True
        try:
            return next(self._items)
        except (StopIteration, OSError, urllib3.exceptions.HTTPError) as end:
            error = self._error_of(end)
            self._over = True
            raise error from None
        finally:
            with self._lock:
                self._reading = False
                over = self._over
            if over:
                self._client.close()

    def close(self) -> None:
        """End the stream. A thread that is reading closes the connection, because no other thread can do so safely."""
        with self._lock:
            self._over = True
            reading = self._reading
        self._client.cancel()
        if not reading:
            self._client.close()

    def _error_of(self, end: Exception) -> Exception:
        """Return the exception that the end of the items means for the reader."""
        if self._over or isinstance(end, StopIteration):
            return StopIteration()
        if isinstance(end, (TimeoutError, urllib3.exceptions.TimeoutError)):
            return end
        return StopIteration() if self._lost is None else self._lost()
