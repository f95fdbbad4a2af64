"""Room for whoever comes next, and patience with slow clients."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Iterator

import gevent
import pytest

import door
from door import ClientSocket, Door


class Visitor:
    """A client that only knows whether it was sent away."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent_off = False

    def hang_up(self) -> None:
        assert not self.sent_off
        self.sent_off = True


def come(door: Door, *addresses: str) -> list[Visitor]:
    visitors = [Visitor(address) for address in addresses]
    for visitor in visitors:
        assert door.enter(visitor, visitor.address)
    return visitors


def test_the_one_that_has_kept_us_waiting_longest_makes_room():
    """Whoever comes last is let in."""
    door = Door(4)
    first, second, *_ = come(door, "a", "b", "c", "d", "e")
    assert (first.sent_off, second.sent_off) == (True, False)


def test_one_that_is_being_answered_stays():
    """However long that takes."""
    door = Door(4)
    first, second, *_ = come(door, "a", "b", "c", "d")
    door.answer(first)
    come(door, "e")
    assert (first.sent_off, second.sent_off) == (False, True)


def test_after_its_answer_a_client_waits_anew():
    """It is the last in the line then."""
    door = Door(3)
    first, second, third = come(door, "a", "b", "c")
    for visitor in (first, second):
        door.answer(visitor)
        door.wait_for(visitor)
    come(door, "d", "e")
    assert [visitor.sent_off for visitor in (first, second, third)] == [True, False, True]


def test_nobody_is_let_in_while_all_are_being_answered():
    """It is told so, and comes again."""
    door = Door(3)
    for visitor in come(door, "a", "b", "c"):
        door.answer(visitor)
    assert not door.enter(Visitor("d"), "d")


def test_an_address_has_its_share_and_others_have_the_rest():
    """It loses connections of its own, though there is room."""
    door = Door(8)
    crowd = come(door, *["a"] * 20)
    others = come(door, "b", "c")
    assert sum(not visitor.sent_off for visitor in crowd) == 6
    assert not any(visitor.sent_off for visitor in others)


def test_the_address_with_the_most_connections_makes_room():
    """Not the one that was there first."""
    door = Door(6)
    guest, *crowd = come(door, "b", *["a"] * 4, "c")
    come(door, "d")
    assert not guest.sent_off
    assert crowd[0].sent_off


@pytest.mark.parametrize("seed", range(30))
def test_whoever_comes_and_goes_the_promises_hold(seed):
    """Never more than there are places, never one sent off that is being answered, nothing kept of those that left."""
    chance, door = random.Random(seed), Door(12)
    inside: list[Visitor] = []
    answered: set[Visitor] = set()
    for _ in range(400):
        roll = chance.random()
        if roll < 0.5:
            visitor = Visitor(chance.choice("abcd"))
            if door.enter(visitor, visitor.address):
                inside.append(visitor)
            else:
                own = [one for one in inside if one.address == visitor.address]
                assert answered.issuperset(inside) or (len(own) == 9 and answered.issuperset(own))
        elif inside:
            visitor = chance.choice(inside)
            if roll < 0.65:
                door.answer(visitor)
                answered.add(visitor)
            elif roll < 0.8:
                door.wait_for(visitor)
                answered.discard(visitor)
            else:
                for _ in range(2):
                    door.leave(visitor)
                inside.remove(visitor)
                answered.discard(visitor)
        assert not any(visitor.sent_off for visitor in answered)
        inside = [visitor for visitor in inside if not visitor.sent_off]
        assert len(inside) <= 12
        assert max(Counter(visitor.address for visitor in inside).values(), default=0) <= 9
    for visitor in inside:
        door.leave(visitor)
    assert (door._addresses, door._count, door._waited_for) == ({}, {}, {})


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
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.05)
    server, client = ends
    client.sendall(b"GET / HT")
    assert server.recv(100) == b"GET / HT"
    assert server.recv(100) == b""


def test_the_seconds_for_a_head_are_not_those_between_its_bytes(ends, monkeypatch):
    """One byte now and then takes as long as none."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.1)
    server, client = ends
    dribble = gevent.spawn(_dribble, client)
    came = _read_all(server)
    dribble.kill()
    assert came


def test_a_body_has_to_come_at_a_pace(ends, monkeypatch):
    """Else its reader is told."""
    monkeypatch.setattr(door, "BODY_SECONDS", 0.05)
    server, client = ends
    server.expect_body()
    dribble = gevent.spawn(_dribble, client)
    with pytest.raises(TimeoutError, match="1000 bytes"):
        _read_all(server)
    dribble.kill()


def test_a_body_that_comes_fast_enough_may_take_its_time(ends, monkeypatch):
    """A long one over a slow line: as many seconds as it has kilobytes."""
    monkeypatch.setattr(door, "BODY_SECONDS", 0.0)
    server, client = ends
    server.expect_body()
    client.sendall(b"x" * 50_000)
    assert len(server.recv(50_000)) == 50_000
    gevent.spawn_later(0.05, client.sendall, b"y")
    assert server.recv(100) == b"y"


def test_the_next_head_may_be_waited_for(ends, monkeypatch):
    """An idle connection is no slow request."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.0)
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


def test_what_was_read_before_comes_first(ends):
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
