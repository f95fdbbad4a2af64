"""Stages to percent and time left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engines.port import Evidence
from services.switching.progress import ORDER, STAGES, History, Progress, learn

evidence = st.none() | st.builds(
    Evidence, stage=st.sampled_from(ORDER), fraction=st.none() | st.floats(-1, 2, allow_nan=False)
)
histories = st.one_of(
    st.just(History()),
    st.floats(0.01, 1e4).map(lambda total: History(total, basis="declared")),
    st.dictionaries(st.sampled_from(ORDER), st.floats(0, 1e3), min_size=1).map(lambda stages: learn([stages])),
)


@given(histories, st.lists(st.tuples(evidence, st.floats(0, 100)), max_size=40))
def test_percent_never_falls_and_never_says_100_before_ready(history, observations):
    """Whatever is reported, in whatever order, and however long it takes."""
    progress, elapsed, before = Progress(history), 0.0, 0
    for seen, step in observations:
        elapsed += step
        estimate = progress.advance(seen, elapsed)
        assert before <= estimate.percent <= 99
        assert estimate.eta_seconds is None or estimate.eta_seconds >= 0
        before = estimate.percent


@given(st.sampled_from(ORDER), st.floats(0, 1))
def test_percent_lies_in_the_stages_range(stage, fraction):
    """Seed 001's ranges hold for what is measured."""
    low, high = STAGES[stage]
    assert low <= Progress(History()).advance(Evidence(stage, fraction), 1.0).percent <= high


def test_what_passed_before_counting_began_is_not_part_of_the_pace():
    """vLLM starts for half a minute before it reads its shards."""
    progress = Progress(History())
    progress.advance(Evidence("loading_weights", None, "starting vLLM"), 0.0)
    assert progress.advance(Evidence("loading_weights", 0.0, "0 of 4 shards"), 30.0).eta_seconds is None
    assert progress.advance(Evidence("loading_weights", 0.5, "2 of 4 shards"), 34.0).eta_seconds == 4.0


def test_the_end_of_a_stage_is_not_said_to_be_the_end_of_the_load():
    """Where nobody knows how long the later stages take, as in a first load."""
    progress = Progress(History())
    progress.advance(Evidence("loading_weights", 0.0), 0.0)
    assert progress.advance(Evidence("loading_weights", 1.0, "4 of 4 shards"), 8.0).eta_seconds is None


def test_a_stage_that_is_counted_from_nothing_keeps_to_what_was_learned_until_there_is_a_pace():
    """It doesn't jump to the stage's whole time at its first count."""
    history = History(40.0, {"loading_weights": 30.0, "warming_up": 10.0})
    progress = Progress(history)
    assert progress.advance(Evidence("loading_weights"), 20.0).eta_seconds == 20.0
    assert progress.advance(Evidence("loading_weights", 0.0, "0 of 4 shards"), 20.0).eta_seconds == 20.0


@pytest.mark.parametrize(
    ("history", "later"),
    [(History(), 0.0), (History(60.0, basis="declared"), 60.0), (History(30.0, {"loading_weights": 30.0}), 30.0)],
)
def test_the_time_left_of_a_download_includes_the_load_as_far_as_that_is_known(history, later):
    """And is none as long as there is no pace."""
    progress = Progress(history)
    assert progress.advance(Evidence("downloading", 0.0), 1.0).eta_seconds is None
    assert progress.advance(Evidence("downloading", 0.25), 11.0).eta_seconds == 30.0 + later


def test_a_download_that_goes_on_from_the_middle_is_not_taken_to_be_that_fast():
    """Half of it was there already."""
    progress = Progress(History())
    assert progress.advance(Evidence("downloading", 0.5), 1.0).eta_seconds is None
    assert progress.advance(Evidence("downloading", 0.6), 11.0).eta_seconds == pytest.approx(40.0)


def test_measured_bytes_extrapolate_to_the_time_left():
    """A quarter read in ten seconds leaves thirty, and says that it was measured."""
    estimate = Progress(History()).advance(Evidence("loading_weights", 0.25, "1 of 4 GB read"), 10.0)
    assert estimate.percent == 35
    assert estimate.basis == "measured"
    assert estimate.eta_seconds == 30.0


def test_without_evidence_the_learned_durations_count():
    """Two earlier loads of 10 s give half way after 4 of 8 s of weights, and 6 s left; basis learned."""
    history = learn([{"loading_weights": 8.0, "warming_up": 2.0}, {"loading_weights": 8.0, "warming_up": 2.0}])
    estimate = Progress(history).advance(Evidence("loading_weights"), 4.0)
    assert (estimate.percent, estimate.basis, estimate.eta_seconds) == (50, "learned", 6.0)


def test_a_load_that_outlasts_its_history_gives_no_figure():
    """Past the usual time there is no honest estimate: unknown, not zero."""
    history = learn([{"loading_weights": 1.0, "warming_up": 0.5}])
    assert Progress(history).advance(Evidence("loading_weights"), 60.0).eta_seconds is None


def test_a_declared_time_counts_until_something_is_learned():
    """The catalogue's load time spreads over the percentages, labelled declared."""
    estimate = Progress(History(100.0, basis="declared")).advance(None, 50.0)
    assert (estimate.percent, estimate.basis, estimate.eta_seconds) == (50, "declared", 50.0)


def test_stage_seconds_add_up_to_the_whole():
    """What is learned from a load is all of its time, each part once."""
    progress = Progress(History())
    progress.advance(Evidence("loading_weights", 0.5), 0.1)
    progress.advance(Evidence("initializing_gpu"), 3.0)
    progress.advance(Evidence("warming_up"), 4.0)
    assert progress.stage_seconds(4.5) == {"loading_weights": 3.0, "initializing_gpu": 1.0, "warming_up": 0.5}
