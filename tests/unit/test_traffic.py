"""Draining an instance."""

from __future__ import annotations

import threading

import pytest

from services.cancellation import Cancelled, CancelToken
from services.switching.traffic import Traffic


def test_a_drain_waits_for_requests_in_flight_and_refuses_new_ones():
    """The drain ends with the last request; new requests are refused meanwhile."""
    traffic = Traffic()
    assert traffic.enter()
    drained: list[bool] = []
    traffic.close()
    drain = threading.Thread(target=lambda: drained.append(traffic.wait_idle(5, CancelToken())), daemon=True)
    drain.start()
    assert not traffic.enter()
    assert drained == []
    traffic.leave()
    drain.join(5)
    assert drained == [True]


def test_a_drain_times_out():
    """The drain times out; the caller cuts off what is still in flight."""
    traffic = Traffic()
    traffic.enter()
    assert not traffic.wait_idle(0.01, CancelToken())
    assert traffic.in_flight == 1


def test_a_drain_can_be_undone():
    """After a cancelled switch the model serves requests again."""
    traffic = Traffic()
    traffic.close()
    assert not traffic.enter()
    traffic.reopen()
    assert traffic.enter()


def test_last_used_is_now_while_answering_then_the_end_of_the_answer():
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


def test_a_drain_ends_as_soon_as_it_is_cancelled():
    """The token wakes the waiting caller; the request in flight continues."""
    traffic, token = Traffic(), CancelToken()
    traffic.enter()
    threading.Timer(0.01, token.cancel).start()
    with pytest.raises(Cancelled):
        traffic.wait_idle(60, token)
    assert traffic.in_flight == 1


def test_the_mean_duration_of_answers_is_derived_from_counts():
    """Little's law: two overlapping answers of 4 and 2 seconds took 3 s on average."""
    now = [100.0]
    traffic = Traffic(clock=lambda: now[0])
    traffic.enter()
    now[0] = 102.0
    traffic.enter()
    now[0] = 104.0
    traffic.leave()
    traffic.leave()
    assert traffic.mean_seconds == 3.0


def test_a_drain_can_be_cut_short():
    """The caller that waits for the last answers continues at once; the next drain waits again."""
    traffic = Traffic()
    traffic.enter()
    traffic.close()
    threading.Timer(0.01, traffic.cut_drain_short).start()
    assert not traffic.wait_idle(60, CancelToken())
    traffic.reopen()
    traffic.close()
    threading.Timer(0.01, traffic.leave).start()
    assert traffic.wait_idle(60, CancelToken())
