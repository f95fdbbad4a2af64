"""Whoever follows a switch as seed 001's stream is told how it ended, whatever became of it."""

from __future__ import annotations

import pytest

from services.switching.jobs import Job
from tests.heart.rig import Heart


@pytest.fixture
def heart():
    """An app at rest over empty engines."""
    heart = Heart()
    yield heart
    heart.close()
    assert heart.scheduler.failures == []


def told(job: Job) -> list[tuple[str, object]]:
    """The events of a job that has ended: the name of each, with the code of an error."""
    return [(event.name, event.data.get("error")) for event in job.follow() if event is not None]


@pytest.mark.parametrize("how", ["superseded", "cancelled", "unloaded", "closed"])
def test_a_switch_that_ends_in_the_queue_is_told_as_an_error(heart, how):
    """It never ran, so that nobody tells its story: the soak found streams that just ended."""
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
    assert (waiting.outcome, told(waiting)) == ("cancelled", [("error", "cancelled")])


def test_a_switch_that_is_refused_for_the_one_under_way_says_the_figures(heart):
    """Told at once, with what it needs and what there is, as one that is refused with nothing under way."""
    heart.switch("medium")
    heart.machine.others["host"] = 5_000_000_000
    refused = heart.switch("large")
    (event,) = [event for event in refused.follow() if event is not None]
    assert (event.name, event.data["error"], event.data["required_gb"]) == ("error", "insufficient_memory", 9.0)
