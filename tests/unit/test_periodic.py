"""What is done regularly goes on until it is stopped, whatever it meets."""

from __future__ import annotations

import threading

from structlog.testing import capture_logs

from services.periodic import Periodic
from tests.support.console import TIMEOUT


def test_it_goes_on_after_a_failure_which_is_logged_once_while_it_stays_the_same() -> None:
    """A look each second at what is broken for an hour would fill the log."""
    calls: list[int] = []
    over = threading.Event()

    def act() -> None:
        calls.append(len(calls))
        match len(calls):
            case 1 | 2 | 5:
                raise OSError("no answer")
            case 3:
                raise ValueError("odd")
            case 6:
                over.set()

    with capture_logs() as logged:
        periodic = Periodic("looking", act, 0.001)
        periodic.start()
        assert over.wait(TIMEOUT)
        periodic.stop(TIMEOUT)
    assert [(line["task"], repr(line["exc_info"])) for line in logged] == [
        ("looking", "OSError('no answer')"),
        ("looking", "ValueError('odd')"),
        ("looking", "OSError('no answer')"),
    ]


def test_a_stop_waits_for_the_call_under_way_and_lets_no_other_begin() -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    def act() -> None:
        calls.append(1)
        begun.set()
        go_on.wait(TIMEOUT)
        calls.append(2)

    periodic = Periodic("working", act, 0.0)
    periodic.start()
    periodic.start()
    assert begun.wait(TIMEOUT)
    periodic.stop()
    assert calls == [1], "without a time-out nobody is waited for"
    go_on.set()
    periodic.stop(TIMEOUT)
    assert calls == [1, 2]
    assert periodic.wait_called(0)
    periodic.start()
    assert not periodic.running


def test_the_first_call_may_come_later() -> None:
    """So that a start isn't held up by what nobody needs then."""
    calls: list[int] = []
    periodic = Periodic("checking", lambda: calls.append(1), 0.0, first_seconds=TIMEOUT)
    periodic.start()
    assert periodic.running
    assert not periodic.wait_called(0.01)
    periodic.stop(TIMEOUT)
    assert calls == []
