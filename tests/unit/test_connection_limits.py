"""Room for the next client, and for every address."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from server.connection_limits import ConnectionLimits


class Visitor:
    """A client that only knows whether it was sent away."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent_off = False

    def hang_up(self) -> None:
        assert not self.sent_off
        self.sent_off = True


def come(limits: ConnectionLimits, *addresses: str) -> list[Visitor]:
    visitors = [Visitor(address) for address in addresses]
    for visitor in visitors:
        assert limits.admit(visitor, visitor.address)
    return visitors


def test_the_one_that_has_kept_us_waiting_longest_makes_room():
    """Whoever comes last is let in."""
    limits = ConnectionLimits(4)
    first, second, *_ = come(limits, "a", "b", "c", "d", "e")
    assert (first.sent_off, second.sent_off) == (True, False)


def test_one_that_is_being_answered_stays():
    """However long that takes."""
    limits = ConnectionLimits(4)
    first, second, *_ = come(limits, "a", "b", "c", "d")
    limits.answer(first)
    come(limits, "e")
    assert (first.sent_off, second.sent_off) == (False, True)


def test_after_its_answer_a_client_waits_anew():
    """It is the last in the line then."""
    limits = ConnectionLimits(3)
    first, second, third = come(limits, "a", "b", "c")
    for visitor in (first, second):
        limits.answer(visitor)
        limits.wait_for(visitor)
    come(limits, "d", "e")
    assert [visitor.sent_off for visitor in (first, second, third)] == [True, False, True]


def test_nobody_is_let_in_while_all_are_being_answered():
    """It is told so, and comes again."""
    limits = ConnectionLimits(3)
    for visitor in come(limits, "a", "b", "c"):
        limits.answer(visitor)
    assert not limits.admit(Visitor("d"), "d")


def test_an_address_has_its_share_and_others_have_the_rest():
    """It loses connections of its own, though there is room."""
    limits = ConnectionLimits(8)
    crowd = come(limits, *["a"] * 20)
    others = come(limits, "b", "c")
    assert sum(not visitor.sent_off for visitor in crowd) == 6
    assert not any(visitor.sent_off for visitor in others)


def test_the_address_with_the_most_connections_makes_room():
    """Not the one that was there first."""
    limits = ConnectionLimits(6)
    guest, *crowd = come(limits, "b", *["a"] * 4, "c")
    come(limits, "d")
    assert not guest.sent_off
    assert crowd[0].sent_off


@pytest.mark.parametrize("seed", range(30))
def test_whoever_comes_and_goes_the_promises_hold(seed):
    """Never more than there are places, never one sent off that is being answered, nothing kept of those that left."""
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
