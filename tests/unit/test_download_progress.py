"""Percent, speed and time left of a transfer."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.downloads.fetcher import Part, Seen
from services.downloads.progress import TransferProgress

MB = 1_000_000

parts = st.dictionaries(
    st.sampled_from("abcd"), st.builds(Part, st.integers(-5, 10**9), st.integers(-5, 10**9)), max_size=4
)
seen = st.builds(
    Seen,
    st.sampled_from(["resolving", "downloading", "verifying", "writing"]),
    parts,
    st.none() | st.integers(-5, 10**10),
)


def downloading(completed: int, total: int, *, expected: int | None = None, name: str = "a") -> Seen:
    return Seen("downloading", {name: Part(completed, total)}, expected)


@settings(deadline=None)
@given(st.lists(st.tuples(seen, st.floats(0, 30)), max_size=40))
def test_whatever_is_seen_the_figures_can_be_shown(observations):
    """Percent never falls and stays below 100 until the end; nothing is negative, no more is here than there is."""
    progress, now, percent = TransferProgress(), 1000.0, 0
    for observation, step in observations:
        now += step
        figures = progress.advance(observation, now)
        assert percent <= figures.percent <= 99
        percent = figures.percent
        assert figures.completed_bytes >= 0
        assert figures.total_bytes is None or figures.completed_bytes <= figures.total_bytes
        assert figures.bytes_per_second is None or figures.bytes_per_second >= 0
        assert figures.eta_seconds is None or figures.eta_seconds >= 0
    assert progress.finish().percent == 100


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.builds(Part, st.integers(0, 10**6), st.integers(10**6, 10**7))))
def test_the_order_of_layers_does_not_matter(layers):
    """At once, one by one, or the other way round: the same sums."""
    at_once = TransferProgress().advance(Seen("downloading", layers), 0.0)
    for order in (list(layers), list(reversed(layers))):
        progress = TransferProgress()
        last = progress.advance(Seen("downloading"), 0.0)
        for name in order:
            last = progress.advance(Seen("downloading", {name: layers[name]}), 0.0)
        assert (last.completed_bytes, last.total_bytes) == (at_once.completed_bytes, at_once.total_bytes)


def test_the_same_observation_again_changes_nothing_but_the_time():
    """A frame that draws what is known already adds no bytes."""
    progress = TransferProgress()
    first = progress.advance(downloading(5 * MB, 10 * MB), 0.0)
    again = progress.advance(downloading(5 * MB, 10 * MB), 0.1)
    assert first == again


def test_a_new_layer_makes_the_whole_larger_but_the_percentage_does_not_fall():
    """Layers are announced one after another."""
    progress = TransferProgress()
    assert progress.advance(downloading(90, 100), 0.0).percent == 90
    grown = progress.advance(downloading(0, 900, name="b"), 1.0)
    assert (grown.percent, grown.completed_bytes, grown.total_bytes) == (90, 90, 1000)


def test_the_size_that_is_known_ahead_is_the_whole():
    """The first layer is then not taken for everything; should more come than was expected, that counts."""
    progress = TransferProgress()
    assert progress.advance(Seen("resolving", expected_bytes=1000), 0.0).total_bytes == 1000
    assert progress.advance(downloading(100, 200), 1.0).percent == 10
    assert progress.advance(downloading(1500, 1500), 2.0).total_bytes == 1500


def test_without_any_size_nothing_is_said_about_the_whole():
    """Unknown is None, and 0 percent."""
    figures = TransferProgress().advance(Seen("resolving"), 0.0)
    assert (figures.percent, figures.total_bytes, figures.bytes_per_second, figures.eta_seconds) == (
        0,
        None,
        None,
        None,
    )


def test_speed_is_what_arrived_in_the_last_seconds_and_gives_the_time_left():
    """Ten seconds at 2 MB/s, then ten at 4 MB/s: the window has forgotten the first."""
    progress, done = TransferProgress(), 0
    for tenth in range(200):
        done += MB // 5 if tenth < 100 else MB * 2 // 5
        figures = progress.advance(downloading(done, 100 * MB), tenth / 10)
        if tenth == 99:
            assert figures.bytes_per_second == pytest.approx(2 * MB, rel=0.05)
    assert figures.bytes_per_second == pytest.approx(4 * MB, rel=0.05)
    assert figures.eta_seconds == pytest.approx((100 * MB - done) / (4 * MB), rel=0.05)


def test_there_is_no_speed_before_half_a_second():
    """Two observations 0.4 s apart say too little, 0.5 s are enough; waiting for the first layer doesn't count."""
    progress = TransferProgress()
    progress.advance(Seen("resolving"), 0.0)
    assert progress.advance(downloading(0, 100 * MB), 9.0).bytes_per_second is None
    assert progress.advance(downloading(4 * MB, 100 * MB), 9.4).bytes_per_second is None
    assert progress.advance(downloading(5 * MB, 100 * MB), 9.5).bytes_per_second == 10 * MB


def test_what_was_here_already_is_no_speed():
    """Neither the bytes of an earlier try, nor a layer that is complete when it first shows up."""
    progress = TransferProgress()
    progress.advance(downloading(60 * MB, 100 * MB), 0.0)
    progress.advance(downloading(500 * MB, 500 * MB, name="b"), 0.5)
    assert progress.advance(downloading(61 * MB, 100 * MB), 1.0).bytes_per_second == 1 * MB


def test_a_stalled_transfer_has_speed_0_and_no_time_left():
    """Once the window holds nothing that arrived, also when only signs of life come."""
    progress = TransferProgress()
    for second in range(4):
        progress.advance(downloading(second * MB, 10 * MB), float(second))
    for second in range(4, 10):
        figures = progress.advance(Seen("downloading"), float(second))
    assert (figures.bytes_per_second, figures.eta_seconds) == (0, None)


def test_checking_has_no_speed():
    """Nothing is moved then, so that neither a speed nor a time left would be honest."""
    progress = TransferProgress()
    progress.advance(downloading(0, 10 * MB), 0.0)
    progress.advance(downloading(10 * MB, 10 * MB), 1.0)
    figures = progress.advance(Seen("verifying"), 1.1)
    assert (figures.percent, figures.bytes_per_second, figures.eta_seconds) == (99, None, None)


def test_the_end_is_100_percent_of_everything():
    """Said by whoever knows, not by the sums."""
    progress = TransferProgress()
    progress.advance(downloading(9 * MB, 10 * MB), 0.0)
    end = progress.finish()
    assert (end.percent, end.completed_bytes, end.total_bytes, end.eta_seconds) == (100, 10 * MB, 10 * MB, None)


def test_an_hour_of_observations_takes_little_time_and_no_more_memory():
    """60 000 of them, as ten an instant for long enough give."""
    progress = TransferProgress()
    for count in range(1000):
        progress.advance(downloading(count, 60_000), count * 0.0015)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    began = time.process_time()
    for count in range(1000, 60_000):
        progress.advance(downloading(count, 60_000), count * 0.0015)
    took, grown = time.process_time() - began, tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert took < 10
    assert grown < 100_000
