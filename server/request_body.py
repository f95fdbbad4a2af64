"""Reads request bodies, and refuses those that are incomplete, malformed, too long or too slow."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout


class RequestBody(io.RawIOBase):
    """The body of one request, for `wsgi.input`. The first read reads all of it; if that fails, each read raises.

    Raises RequestEntityTooLarge beyond `most` bytes, RequestTimeout when it comes too slowly, and OSError when it is
    malformed or ends early. `on_whole` is called once the whole body has arrived. Without this class, a request cut to
    a valid prefix could be executed: gunicorn treats a body that ends early as complete, and returns the part before
    the error at the second read of a malformed one; werkzeug cuts a body that is too long.
    """

    def __init__(self, environ: Mapping[str, Any], most: int, on_whole: Callable[[], None] = lambda: None) -> None:
        self._stream = environ["wsgi.input"]
        self._length = environ.get("CONTENT_LENGTH")
        self._most = most
        self._on_whole = on_whole
        self._body: io.BytesIO | None = None
        self._refusal: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._body is None:
            self._body = io.BytesIO(self._whole())
        return self._body.readinto(buffer)

    def _whole(self) -> bytes:
        if self._refusal is None:
            try:
                body: bytes = self._stream.read(self._most + 1)
            except TimeoutError as error:
                self._refusal = RequestTimeout(f"The body came too slowly: {error}.")
            except Exception as error:
                self._refusal = OSError(f"the request's body is malformed, or broke off: {error}")
            else:
                if len(body) > self._most:
                    self._refusal = RequestEntityTooLarge()
                elif not self._length or len(body) == int(self._length):
                    self._on_whole()
                    return body
                else:
                    self._refusal = OSError("the request's body ends early")
        raise self._refusal
