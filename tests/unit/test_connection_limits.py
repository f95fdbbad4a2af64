"""The limits on connections, in all and per address, and which connection is closed for a new one."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from server.connection_limits import ConnectionLimits


class Visitor:
    """A client's connection that records whether it was closed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent_off = False

    def disconnect(self) -> None:
        assert not self.sent_off
        self.sent_off = True


def connect(limits: ConnectionLimits, *addresses: str) -> list[Visitor]:
    visitors = [Visitor(address) for address in addresses]
    for visitor in visitors:
        assert limits.admit(visitor, visitor.address)
    return visitors


def test_the_longest_waiting_connection_is_closed_for_a_new_one():
    """The new connection is accepted."""
    limits = ConnectionLimits(4)
    first, second, *_ = connect(limits, "a", "b", "c", "d", "e")
    assert (first.sent_off, second.sent_off) == (True, False)


def test_a_connection_being_answered_is_not_closed():
    """However long its answer takes."""
    limits = ConnectionLimits(4)
    first, second, *_ = connect(limits, "a", "b", "c", "d")
    limits.answer(first)
    connect(limits, "e")
    assert (first.sent_off, second.sent_off) == (False, True)


def test_waiting_time_restarts_after_an_answer():
    """Its waiting time starts again."""
    limits = ConnectionLimits(3)
    first, second, third = connect(limits, "a", "b", "c")
    for visitor in (first, second):
        limits.answer(visitor)
        limits.wait_for(visitor)
    connect(limits, "d", "e")
    assert [visitor.sent_off for visitor in (first, second, third)] == [True, False, True]


def test_a_new_connection_is_refused_while_all_are_being_answered():
    """The new connection is refused, with a request to try again."""
    limits = ConnectionLimits(3)
    for visitor in connect(limits, "a", "b", "c"):
        limits.answer(visitor)
    assert not limits.admit(Visitor("d"), "d")


def test_an_address_has_a_maximum_share():
    """A new connection closes one of the same address, even if there is room in all."""
    limits = ConnectionLimits(8)
    crowd = connect(limits, *["a"] * 20)
    others = connect(limits, "b", "c")
    assert sum(not visitor.sent_off for visitor in crowd) == 6
    assert not any(visitor.sent_off for visitor in others)


def test_the_address_with_the_most_connections_loses_one():
    """Not the address that was first."""
    limits = ConnectionLimits(6)
    guest, *crowd = connect(limits, "b", *["a"] * 4, "c")
    connect(limits, "d")
    assert not guest.sent_off
    assert crowd[0].sent_off


@pytest.mark.parametrize("seed", range(30))
def test_invariants_hold_for_random_connections(seed):
    """Never more connections than allowed, never one closed that is being answered, nothing kept of closed ones."""
    chance, limits = random.Random(seed), ConnectionLimits(12)
    inside: list[Visitor] = []
    answered: set[Visitor] = set()
    for _ in range(400):
        roll = chance.random()
        if roll < 0.5:
            visitor = Visitor(chance.choice("abcd"))
            if limits.admit(visitor, visitor.address):
                inside.append(visitor)
            else:
                own = [one for one in inside if one.address == visitor.address]
                assert answered.issuperset(inside) or (len(own) == 9 and answered.issuperset(own))
        elif inside:
            visitor = chance.choice(inside)
            if roll < 0.65:
                limits.answer(visitor)
                answered.add(visitor)
            elif roll < 0.8:
                limits.wait_for(visitor)
                answered.discard(visitor)
            else:
                for _ in range(2):
                    limits.remove(visitor)
                inside.remove(visitor)
                answered.discard(visitor)
        assert not any(visitor.sent_off for visitor in answered)
        inside = [visitor for visitor in inside if not visitor.sent_off]
        assert len(inside) <= 12
        assert max(Counter(visitor.address for visitor in inside).values(), default=0) <= 9
    for visitor in inside:
        limits.remove(visitor)
    assert (limits._addresses, limits._count, limits._waited_for) == ({}, {}, {})
