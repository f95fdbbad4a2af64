"""The handover from one worker to the next: connections with requests that were not started."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from flask import Flask
from werkzeug.test import EnvironBuilder

from app import create_app
from server.handover import Handover, request_bytes
from services.gateway.router import ClientGone, GatewayError
from services.restart import UNBEGUN
from services.switching.jobs import SwitchError
from tests.support.console import NO_OLLAMA


def test_a_request_is_handed_over_completely() -> None:
    """Whatever its size and bytes, with its connection; the channel is empty afterwards."""
    ours, theirs = socket.socketpair()
    body = bytes(range(256)) * 20_000
    environ = {
        "REQUEST_METHOD": "POST",
        "RAW_URI": "/v1/chat/completions?a=%20b",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_TYPE": "application/json",
        "HTTP_X_TITLE": "caf\xe9",
        "HTTP_EXPECT": "100-continue",
        "HTTP_TRANSFER_ENCODING": "chunked",
    }
    with closing(ours), closing(theirs), closing(Handover()) as channel:
        assert channel.take() is None
        assert channel.give(theirs, request_bytes(environ, body))
        left = channel.take()
        assert left is not None
        with socket.socket(fileno=left[0]) as client:
            client.sendall(b"answered")
        assert ours.recv(100) == b"answered"
        assert channel.take() is None
    head, _, rest = left[1].partition(b"\r\n\r\n")
    assert rest == body
    assert head.decode("latin-1").split("\r\n") == [
        "POST /v1/chat/completions?a=%20b HTTP/1.1",
        "Content-Type: application/json",
        "X-Title: caf\xe9",
        f"Content-Length: {len(body)}",
    ]


def test_a_full_channel_refuses_a_request() -> None:
    """The old worker then answers it itself."""
    with socket.socket() as client, closing(Handover()) as channel:
        given = 0
        while channel.give(client, b"GET / HTTP/1.1\r\n\r\n"):
            given += 1
            assert given < 100_000
        assert given > 50
        for _ in range(given):
            left = channel.take()
            assert left is not None
            socket.close(left[0])
        assert channel.take() is None


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """An app whose restart was requested; nothing of it runs."""
    monkeypatch.setenv("SWITCHYARD_STATE_DIR", str(tmp_path / "state"))
    app = create_app(models_dir=tmp_path, ollama_base_url=NO_OLLAMA)
    services = app.extensions["switchyard"]
    services.restart.possible = True
    services.restart.request()
    yield app
    services.store.close()


@pytest.mark.parametrize(
    "error", [ClientGone(), GatewayError("cancelled", "It was cancelled."), SwitchError("stopping", "It stops.")]
)
def test_a_waiting_request_is_handed_over_to_the_next_worker(
    app: Flask, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever ended its wait: nothing of the request has reached an engine."""

    def wait(_name: str | None, _left: Callable[[], bool]) -> None:
        raise error

    monkeypatch.setattr(app.extensions["switchyard"].router, "admit", wait)
    body = b'{"model": "a", "messages": []}'
    environ = EnvironBuilder(
        "/v1/chat/completions", method="POST", data=body, content_type="application/json"
    ).get_environ()
    statuses: list[str] = []
    app(environ, lambda status, *_: statuses.append(status))  # type: ignore[arg-type, return-value]
    assert environ[UNBEGUN] == body
    assert statuses[0][:3] in ("499", "409", "503"), "the response if it can't be handed over"
