"""The periodic runner continues until it is stopped, whatever its function raises."""

from __future__ import annotations

import threading

from structlog.testing import capture_logs

from services.periodic import Periodic
from tests.support.console import TIMEOUT


def test_a_repeated_failure_is_logged_once_and_does_not_stop_it() -> None:
    """A failure that repeats every second for an hour must not fill the log."""
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


def test_a_stop_waits_for_the_current_call_and_prevents_the_next() -> None:
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
    assert calls == [1], "with a timeout of zero it waits for nothing"
    go_on.set()
    periodic.stop(TIMEOUT)
    assert calls == [1, 2]
    assert periodic.wait_called(0)
    periodic.start()
    assert not periodic.running


def test_the_first_call_can_be_delayed() -> None:
    """So that it does not slow down the start of the app."""
    calls: list[int] = []
    periodic = Periodic("checking", lambda: calls.append(1), 0.0, first_seconds=TIMEOUT)
    periodic.start()
    assert periodic.running
    assert not periodic.wait_called(0.01)
    periodic.stop(TIMEOUT)
    assert calls == []
