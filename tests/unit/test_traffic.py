"""Draining an instance."""

from __future__ import annotations

import threading

from services.switching.traffic import Traffic


def test_a_drain_waits_for_those_inside_and_lets_nobody_in():
    """The drain ends when the last request does; meanwhile a new one is turned away."""
    traffic = Traffic()
    assert traffic.enter()
    drained: list[bool] = []
    drain = threading.Thread(target=lambda: drained.append(traffic.drain(5)), daemon=True)
    drain.start()
    while traffic.enter():
        traffic.leave()  # until the drain has closed the door
    assert drained == []
    traffic.leave()
    drain.join(5)
    assert drained == [True]


def test_a_drain_that_takes_too_long_says_so():
    """The bound holds: what is still in flight then is the caller's to cut."""
    traffic = Traffic()
    traffic.enter()
    assert not traffic.drain(0.01)
    assert traffic.in_flight == 1


def test_a_drain_can_be_taken_back():
    """After a cancelled switch the model goes on serving."""
    traffic = Traffic()
    traffic.drain(0)
    assert not traffic.enter()
    traffic.reopen()
    assert traffic.enter()


def test_last_used_is_now_while_answering_and_the_end_afterwards():
    """An instance that is answering is not idle."""
    now = [100.0]
    traffic = Traffic(clock=lambda: now[0])
    assert traffic.last_used is None
    traffic.enter()
    now[0] = 150.0
    assert traffic.last_used == 150.0
    traffic.leave()
    now[0] = 200.0
    assert traffic.last_used == 150.0
