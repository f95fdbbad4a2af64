"""The benchmark's table of a switch by phases."""

from __future__ import annotations

import pytest

from bench.timeline import Timeline, phases, table

EVENTS = [
    (10.001, "stage", {"stage": "checking_memory", "progress": 0}),
    (10.002, "stage", {"stage": "unloading_models", "unloading": ["a"]}),
    (10.004, "progress", {"stage": "draining", "model": "a"}),
    (10.005, "progress", {"stage": "unloading", "model": "a"}),
    (10.025, "stage", {"stage": "loading_target", "model": "b"}),
    (10.035, "progress", {"stage": "loading", "phase": "loading_weights", "progress": 60}),
    (10.055, "progress", {"stage": "loading", "phase": "loading_weights", "progress": 70}),
    (10.085, "progress", {"stage": "warming_up", "phase": "warming_up", "progress": 90}),
    (10.100, "complete", {"status": "success"}),
]


def test_a_phase_lasts_until_the_event_that_begins_the_next():
    """The first begins with the request; the phases add up to the whole switch."""
    seconds = phases(10.0, EVENTS)
    expected = {"plan": 4, "drain": 1, "unload": 20, "start": 10, "load weights": 50, "warm up": 15}
    assert {phase: round(1000 * taken) for phase, taken in seconds.items()} == expected
    assert sum(seconds.values()) == pytest.approx(0.1)


def test_a_failed_switch_has_no_timeline():
    with pytest.raises(RuntimeError, match="no memory"):
        phases(10.0, [(10.1, "error", {"error": "insufficient_memory", "message": "no memory"})])


def test_the_table_has_the_phases_that_occurred_in_order_and_says_what_was_not_measured():
    timelines = [
        Timeline("one", [{"warm up": 0.01, "plan": 0.002}, {"warm up": 0.03, "plan": 0.002}]),
        Timeline("two", note="not measured: nothing there"),
    ]
    assert table(timelines).splitlines() == [
        "| engine | plan | warm up | total |",
        "|---|---|---|---|",
        "| one | 2 | 20 | 22 |",
        "| two | – | – | not measured: nothing there |",
    ]
