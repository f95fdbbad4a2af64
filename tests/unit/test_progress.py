"""From stages to percent and time left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engines.port import STAGE_ORDER, Evidence
from services.switching.progress import STAGES, History, Progress, learn

evidence = st.none() | st.builds(
    Evidence, stage=st.sampled_from(STAGE_ORDER), fraction=st.none() | st.floats(-1, 2, allow_nan=False)
)
histories = st.one_of(
    st.just(History()),
    st.floats(0.01, 1e4).map(lambda total: History(total, basis="declared")),
    st.dictionaries(st.sampled_from(STAGE_ORDER), st.floats(0, 1e3), min_size=1).map(lambda stages: learn([stages])),
)


@given(histories, st.lists(st.tuples(evidence, st.floats(0, 100)), max_size=40))
def test_percent_never_falls_and_is_below_100_until_ready(history, observations):
    """For any observations in any order, and any duration."""
    progress, elapsed, before = Progress(history), 0.0, 0
    for seen, step in observations:
        elapsed += step
        estimate = progress.advance(seen, elapsed)
        assert before <= estimate.percent <= 99
        assert estimate.eta_seconds is None or estimate.eta_seconds >= 0
        before = estimate.percent


@given(st.sampled_from(STAGE_ORDER), st.floats(0, 1))
def test_percent_lies_in_the_stages_range(stage, fraction):
    """Measured percentages stay in seed 001's ranges."""
    low, high = STAGES[stage]
    assert low <= Progress(History()).advance(Evidence(stage, fraction), 1.0).percent <= high


def test_time_before_counting_does_not_affect_the_speed():
    """vLLM starts for half a minute before it reads its shards."""
    progress = Progress(History())
    progress.advance(Evidence("loading_weights", None, "starting vLLM"), 0.0)
    assert progress.advance(Evidence("loading_weights", 0.0, "0 of 4 shards"), 30.0).eta_seconds is None
    assert progress.advance(Evidence("loading_weights", 0.5, "2 of 4 shards"), 34.0).eta_seconds == 4.0


def test_the_end_of_a_stage_is_not_shown_as_the_end_of_the_load():
    """In a first load the duration of the later stages is unknown."""
    progress = Progress(History())
    progress.advance(Evidence("loading_weights", 0.0), 0.0)
    assert progress.advance(Evidence("loading_weights", 1.0, "4 of 4 shards"), 8.0).eta_seconds is None


def test_a_counted_stage_uses_learned_times_until_it_has_a_speed():
    """The time left doesn't jump to the stage's whole time at the first count."""
    history = History(40.0, {"loading_weights": 30.0, "warming_up": 10.0})
    progress = Progress(history)
    assert progress.advance(Evidence("loading_weights"), 20.0).eta_seconds == 20.0
    assert progress.advance(Evidence("loading_weights", 0.0, "0 of 4 shards"), 20.0).eta_seconds == 20.0


@pytest.mark.parametrize(
    ("history", "later"),
    [(History(), 0.0), (History(60.0, basis="declared"), 60.0), (History(30.0, {"loading_weights": 30.0}), 30.0)],
)
def test_the_time_left_of_a_download_includes_the_load_if_known(history, later):
    """It is unknown as long as there is no speed."""
    progress = Progress(history)
    assert progress.advance(Evidence("downloading", 0.0), 1.0).eta_seconds is None
    assert progress.advance(Evidence("downloading", 0.25), 11.0).eta_seconds == 30.0 + later


def test_bytes_of_a_resumed_download_do_not_count_as_speed():
    """Half of the bytes were there at the start."""
    progress = Progress(History())
    assert progress.advance(Evidence("downloading", 0.5), 1.0).eta_seconds is None
    assert progress.advance(Evidence("downloading", 0.6), 11.0).eta_seconds == pytest.approx(40.0)


def test_measured_bytes_extrapolate_to_the_time_left():
    """A quarter read in ten seconds leaves thirty; the basis is `measured`."""
    estimate = Progress(History()).advance(Evidence("loading_weights", 0.25, "1 of 4 GB read"), 10.0)
    assert estimate.percent == 35
    assert estimate.basis == "measured"
    assert estimate.eta_seconds == 30.0


def test_without_evidence_learned_durations_are_used():
    """Two earlier loads of 10 s: after 4 of 8 s of weights it is half way, with 6 s left; the basis is `learned`."""
    history = learn([{"loading_weights": 8.0, "warming_up": 2.0}, {"loading_weights": 8.0, "warming_up": 2.0}])
    estimate = Progress(history).advance(Evidence("loading_weights"), 4.0)
    assert (estimate.percent, estimate.basis, estimate.eta_seconds) == (50, "learned", 6.0)


def test_a_load_longer_than_its_history_has_no_time_left():
    """Beyond the usual time the time left is unknown, not zero."""
    history = learn([{"loading_weights": 1.0, "warming_up": 0.5}])
    assert Progress(history).advance(Evidence("loading_weights"), 60.0).eta_seconds is None


def test_a_declared_time_is_used_until_something_is_learned():
    """The declared load time is spread over the percentages; the basis is `declared`."""
    estimate = Progress(History(100.0, basis="declared")).advance(None, 50.0)
    assert (estimate.percent, estimate.basis, estimate.eta_seconds) == (50, "declared", 50.0)


def test_stage_seconds_add_up_to_the_whole():
    """What a load teaches is all of its time, each part once."""
    progress = Progress(History())
    progress.advance(Evidence("loading_weights", 0.5), 0.1)
    progress.advance(Evidence("initializing_gpu"), 3.0)
    progress.advance(Evidence("warming_up"), 4.0)
    assert progress.stage_seconds(4.5) == {"loading_weights": 3.0, "initializing_gpu": 1.0, "warming_up": 0.5}
