"""Every follower of a switch gets an event that says how it ended."""

from __future__ import annotations

import pytest

from services.switching.jobs import Job
from tests.heart.rig import Heart


@pytest.fixture
def heart():
    """An app at rest, with nothing loaded."""
    heart = Heart()
    yield heart
    heart.close()
    assert heart.scheduler.failures == []


def events_of(job: Job) -> list[tuple[str, object]]:
    """The events of an ended job: the name of each, with the code of an error."""
    return [(event.name, event.data.get("error")) for event in job.follow() if event is not None]


@pytest.mark.parametrize("how", ["superseded", "cancelled", "unloaded", "closed"])
def test_a_switch_that_ends_in_the_queue_reports_an_error(heart, how):
    """Such a switch never runs and reports nothing itself: the soak test found streams that just ended."""
    first = heart.switch("medium")
    waiting = heart.switch("small", replace="queue")
    assert waiting.outcome is None
    {
        "superseded": lambda: heart.switch("large"),
        "cancelled": lambda: heart.switcher.cancel(switch_id=waiting.id),
        "unloaded": lambda: heart.switcher.stop("small", requested_by="test"),
        "closed": heart.switcher.close,
    }[how]()
    heart.done(first)
    assert (waiting.outcome, events_of(waiting)) == ("cancelled", [("error", "cancelled")])


def test_a_switch_refused_during_another_one_reports_the_figures(heart):
    """The refusal is reported at once, with required and available memory, as when no switch is under way."""
    heart.switch("medium")
    heart.machine.others["host"] = 5_000_000_000
    refused = heart.switch("large")
    (event,) = [event for event in refused.follow() if event is not None]
    assert (event.name, event.data["error"], event.data["required_gb"]) == ("error", "insufficient_memory", 9.0)
