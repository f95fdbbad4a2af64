"""Polls that are answered without Flask: the status document, and what a page lacks of pieces that are drawn already.

Tabs and scripts poll every two seconds. Nearly always nothing has changed, or the same for all of them. A poll that
needs anything else, an error included, goes through Flask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple
from urllib.parse import parse_qsl

from flask import Flask, Response

from blueprints import chat, models
from blueprints.api.status_cache import status_document
from blueprints.web import SECURITY_HEADERS, compress
from services.container import Services

STATUS = "/v1/models/status"
PAGES: Mapping[str, Callable[[Mapping[str, str]], str | None]] = {
    "/fragments/chat-status": chat.drawn_news,
    "/fragments/models": models.drawn_news,
}
"""What a page lacks, given the marks that it sends, by the path that it polls."""
PATHS = (STATUS, *PAGES)


class PollAnswer(NamedTuple):
    """A whole answer. `fields` are its headers, except those that every answer has."""

    status: int
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""


class Polls:
    """Answers polls from what was computed for earlier ones."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._services: Services = app.extensions["switchyard"]

    def answer(self, path: str, query: str, accepted_encoding: str) -> PollAnswer | None:
        """Return the answer to a GET request that the guard has let in; None if it has to go through Flask."""
        if path == STATUS:
            return _whole(self._json, status_document(self._services))
        marks = dict(reversed(parse_qsl(query, keep_blank_values=True)))  # the first of two counts, as in Flask
        try:
            with self._app.app_context():
                news = PAGES[path](marks)
        except Exception:
            return None  # Flask meets the same error, and reports it
        if not news:
            return None if news is None else PollAnswer(204, self._html)
        page = news.encode()
        compressed = compress(page, accepted_encoding)
        if compressed is None:
            return _whole(self._html, page)
        return _whole([*self._html, (b"Content-Encoding", b"gzip")], compressed)

    @cached_property
    def _json(self) -> list[tuple[bytes, bytes]]:
        return self._fields(Response(mimetype="application/json"))

    @cached_property
    def _html(self) -> list[tuple[bytes, bytes]]:
        return self._fields(Response())

    def _fields(self, response: Response) -> list[tuple[bytes, bytes]]:
        """Return the headers that the app gives to a response of this kind."""
        with self._app.test_request_context():
            headers = self._app.process_response(response).headers
        left_out = {"Content-Length", *dict(SECURITY_HEADERS)}
        return [(name.encode(), value.encode()) for name, value in headers if name not in left_out]


def _whole(fields: list[tuple[bytes, bytes]], body: bytes) -> PollAnswer:
    return PollAnswer(200, [*fields, (b"Content-Length", b"%d" % len(body))], body)
