"""Patience with slow clients, and its end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import gevent
import pytest

from server import client_socket
from server.client_socket import ClientSocket


@pytest.fixture
def ends() -> Iterator[tuple[ClientSocket, socket.socket]]:
    """A client's connection as the server has it, and as the client does."""
    ours, theirs = socket.socketpair()
    server = ClientSocket(ours.detach())
    yield server, theirs
    server.close()
    theirs.close()


def test_a_head_that_does_not_end_is_as_good_as_none(ends, monkeypatch):
    """Its reader finds the connection closed."""
    monkeypatch.setattr(client_socket, "HEAD_SECONDS", 0.05)
    server, client = ends
    client.sendall(b"GET / HT")
    assert server.recv(100) == b"GET / HT"
    assert server.recv(100) == b""


def test_the_seconds_for_a_head_are_not_those_between_its_bytes(ends, monkeypatch):
    """One byte now and then takes as long as none."""
    monkeypatch.setattr(client_socket, "HEAD_SECONDS", 0.1)
    server, client = ends
    dribble = gevent.spawn(_dribble, client)
    came = _read_all(server)
    dribble.kill()
    assert came


def test_a_body_has_to_come_at_a_pace(ends, monkeypatch):
    """Else its reader is told."""
    monkeypatch.setattr(client_socket, "BODY_SECONDS", 0.05)
    server, client = ends
    server.expect_body()
    dribble = gevent.spawn(_dribble, client)
    with pytest.raises(TimeoutError, match="1000 bytes"):
        _read_all(server)
    dribble.kill()


def test_a_body_that_comes_fast_enough_may_take_its_time(ends, monkeypatch):
    """A long one over a slow line: as many seconds as it has kilobytes."""
    monkeypatch.setattr(client_socket, "BODY_SECONDS", 0.0)
    server, client = ends
    server.expect_body()
    client.sendall(b"x" * 50_000)
    assert len(server.recv(50_000)) == 50_000
    gevent.spawn_later(0.05, client.sendall, b"y")
    assert server.recv(100) == b"y"


def test_the_next_head_may_be_waited_for(ends, monkeypatch):
    """An idle connection is no slow request."""
    monkeypatch.setattr(client_socket, "HEAD_SECONDS", 0.0)
    server, client = ends
    server.expect_body()
    server.expect_head()
    gevent.spawn_later(0.05, client.sendall, b"GET")
    assert server.recv(100) == b"GET"


def test_a_client_that_takes_nothing_of_its_answer_is_given_up(ends):
    """It held a greenlet, and the engine's answer, for ever."""
    server, _ = ends
    server.timeout = 0.05
    with pytest.raises(TimeoutError):
        server.sendall(b"x" * 50_000_000)


def test_unread_bytes_are_read_first(ends):
    """A connection that another worker has left, with the request that it had read."""
    server, client = ends
    client.sendall(b" and more")
    resumed = ClientSocket(server.detach(), b"read before")
    assert (resumed.recv(4), resumed.recv(100), resumed.recv(100)) == (b"read", b" before", b" and more")
    resumed.close()


def _read_all(server: ClientSocket) -> bytes:
    came = b""
    while piece := server.recv(100):
        came += piece
    return came


def _dribble(client: socket.socket) -> None:
    while True:
        client.sendall(b"x")
        gevent.sleep(0.005)
