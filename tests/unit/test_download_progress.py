"""Percent, speed and time left of a transfer."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.downloads.fetcher import FileProgress, TransferUpdate
from services.downloads.progress import TransferProgress

MB = 1_000_000

parts = st.dictionaries(
    st.sampled_from("abcd"), st.builds(FileProgress, st.integers(-5, 10**9), st.integers(-5, 10**9)), max_size=4
)
seen = st.builds(
    TransferUpdate,
    st.sampled_from(["resolving", "downloading", "verifying", "writing"]),
    parts,
    st.none() | st.integers(-5, 10**10),
)


def downloading(completed: int, total: int, *, expected: int | None = None, name: str = "a") -> TransferUpdate:
    return TransferUpdate("downloading", {name: FileProgress(completed, total)}, expected)


@settings(deadline=None)
@given(st.lists(st.tuples(seen, st.floats(0, 30)), max_size=40))
def test_figures_are_valid_for_any_observations(observations):
    """Percent never falls and stays below 100 until the end; figures are not negative, completed is at most total."""
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
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.builds(FileProgress, st.integers(0, 10**6), st.integers(10**6, 10**7))
    )
)
def test_the_order_of_layers_does_not_matter(layers):
    """All at once, one by one, or in reverse: the sums are the same."""
    at_once = TransferProgress().advance(TransferUpdate("downloading", layers), 0.0)
    for order in (list(layers), list(reversed(layers))):
        progress = TransferProgress()
        last = progress.advance(TransferUpdate("downloading"), 0.0)
        for name in order:
            last = progress.advance(TransferUpdate("downloading", {name: layers[name]}), 0.0)
        assert (last.completed_bytes, last.total_bytes) == (at_once.completed_bytes, at_once.total_bytes)


def test_a_repeated_observation_changes_only_the_time():
    """A repeated observation adds no bytes."""
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


def test_a_size_known_in_advance_is_the_total():
    """The first layer is then not taken for the whole; if more arrives than expected, the total grows."""
    progress = TransferProgress()
    assert progress.advance(TransferUpdate("resolving", expected_bytes=1000), 0.0).total_bytes == 1000
    assert progress.advance(downloading(100, 200), 1.0).percent == 10
    assert progress.advance(downloading(1500, 1500), 2.0).total_bytes == 1500


def test_without_any_size_the_total_is_unknown():
    """The total is None, and the percentage 0."""
    figures = TransferProgress().advance(TransferUpdate("resolving"), 0.0)
    assert (figures.percent, figures.total_bytes, figures.bytes_per_second, figures.eta_seconds) == (
        0,
        None,
        None,
        None,
    )


def test_speed_comes_from_the_last_seconds_and_gives_the_time_left():
    """Ten seconds at 2 MB/s, then ten at 4 MB/s: the window holds only the second speed."""
    progress, done = TransferProgress(), 0
    for tenth in range(200):
        done += MB // 5 if tenth < 100 else MB * 2 // 5
        figures = progress.advance(downloading(done, 100 * MB), tenth / 10)
        if tenth == 99:
            assert figures.bytes_per_second == pytest.approx(2 * MB, rel=0.05)
    assert figures.bytes_per_second == pytest.approx(4 * MB, rel=0.05)
    assert figures.eta_seconds == pytest.approx((100 * MB - done) / (4 * MB), rel=0.05)


def test_there_is_no_speed_before_half_a_second():
    """0.4 s between two observations are too short, 0.5 s are enough; waiting for the first layer doesn't count."""
    progress = TransferProgress()
    progress.advance(TransferUpdate("resolving"), 0.0)
    assert progress.advance(downloading(0, 100 * MB), 9.0).bytes_per_second is None
    assert progress.advance(downloading(4 * MB, 100 * MB), 9.4).bytes_per_second is None
    assert progress.advance(downloading(5 * MB, 100 * MB), 9.5).bytes_per_second == 10 * MB


def test_bytes_present_at_the_start_do_not_count_as_speed():
    """Neither bytes of an earlier attempt nor a layer that is complete when first seen count as speed."""
    progress = TransferProgress()
    progress.advance(downloading(60 * MB, 100 * MB), 0.0)
    progress.advance(downloading(500 * MB, 500 * MB, name="b"), 0.5)
    assert progress.advance(downloading(61 * MB, 100 * MB), 1.0).bytes_per_second == 1 * MB


def test_a_stalled_transfer_has_speed_0_and_no_time_left():
    """Once no bytes arrived within the window, even if reports continue."""
    progress = TransferProgress()
    for second in range(4):
        progress.advance(downloading(second * MB, 10 * MB), float(second))
    for second in range(4, 10):
        figures = progress.advance(TransferUpdate("downloading"), float(second))
    assert (figures.bytes_per_second, figures.eta_seconds) == (0, None)


def test_verifying_has_no_speed():
    """Verifying transfers nothing, so neither a speed nor a time left is shown."""
    progress = TransferProgress()
    progress.advance(downloading(0, 10 * MB), 0.0)
    progress.advance(downloading(10 * MB, 10 * MB), 1.0)
    figures = progress.advance(TransferUpdate("verifying"), 1.1)
    assert (figures.percent, figures.bytes_per_second, figures.eta_seconds) == (99, None, None)


def test_success_is_100_percent():
    """100 percent comes from the success report, not from the sums."""
    progress = TransferProgress()
    progress.advance(downloading(9 * MB, 10 * MB), 0.0)
    end = progress.finish()
    assert (end.percent, end.completed_bytes, end.total_bytes, end.eta_seconds) == (100, 10 * MB, 10 * MB, None)


def test_an_hour_of_observations_takes_little_time_and_no_more_memory():
    """60,000 observations, ten at a time."""
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
