"""Time limits for slow clients."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import gevent
import pytest
from gevent.socket import socket as GeventSocket

from server import client_socket
from server.client_socket import ClientSocket


@pytest.fixture
def ends() -> Iterator[tuple[ClientSocket, socket.socket]]:
    """A connection's two ends: the server's and the client's."""
    ours, theirs = socket.socketpair()
    server = ClientSocket(ours.detach())
    yield server, theirs
    server.close()
    theirs.close()


def test_a_head_must_be_complete_in_time(ends, monkeypatch):
    """The server reads the end of the connection."""
    monkeypatch.setattr(client_socket, "HEAD_SECONDS", 0.05)
    server, client = ends
    client.sendall(b"GET / HT")
    assert server.recv(100) == b"GET / HT"
    assert server.recv(100) == b""


def test_the_limit_for_a_head_covers_all_its_bytes(ends, monkeypatch):
    """Sending a byte now and then doesn't extend the limit."""
    monkeypatch.setattr(client_socket, "HEAD_SECONDS", 0.1)
    server, client = ends
    dribble = gevent.spawn(_dribble, client)
    came = _read_all(server)
    dribble.kill()
    assert came


def test_a_body_must_arrive_at_a_minimum_speed(ends, monkeypatch):
    """A body that is too slow raises an error in its reader."""
    monkeypatch.setattr(client_socket, "BODY_SECONDS", 0.05)
    server, client = ends
    server.expect_body()
    dribble = gevent.spawn(_dribble, client)
    with pytest.raises(TimeoutError, match="1000 bytes"):
        _read_all(server)
    dribble.kill()


def test_a_long_body_may_take_longer(ends, monkeypatch):
    """A long body on a slow line may take a second per kilobyte."""
    monkeypatch.setattr(client_socket, "BODY_SECONDS", 0.5)
    server, client = ends
    server.expect_body()
    client.sendall(b"x" * 50_000)
    assert len(server.recv(50_000)) == 50_000
    gevent.spawn_later(0.6, client.sendall, b"y")
    assert server.recv(100) == b"y"


def test_an_idle_connection_has_no_head_limit(ends, monkeypatch):
    """Waiting for the next request on an idle connection has no such limit."""
    monkeypatch.setattr(client_socket, "HEAD_SECONDS", 0.0)
    server, client = ends
    server.expect_body()
    server.expect_head()
    gevent.spawn_later(0.05, client.sendall, b"GET")
    assert server.recv(100) == b"GET"


def test_a_client_that_reads_nothing_is_disconnected(ends):
    """Such a client occupied a greenlet and the engine's answer for ever."""
    server, _ = ends
    server.timeout = 0.05
    with pytest.raises(TimeoutError):
        server.sendall(b"x" * 50_000_000)


def test_an_answer_larger_than_the_kernel_buffers_arrives_whole(ends):
    """What does not fit at once is sent as the client takes it, from where the first part ended."""
    server, client = ends
    answer = bytes(range(256)) * 40_000
    reading = gevent.spawn(_read_exactly, GeventSocket(fileno=client.detach()), len(answer))
    server.sendall(answer)
    assert reading.get() == answer


def test_unread_bytes_are_read_first(ends):
    """For a connection that another worker has handed over with the request that it had read."""
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


def _read_exactly(client: GeventSocket, length: int) -> bytes:
    came = bytearray()
    with client:
        while len(came) < length:
            came += client.recv(length)
    return bytes(came)


def _dribble(client: socket.socket) -> None:
    while True:
        client.sendall(b"x")
        gevent.sleep(0.005)
