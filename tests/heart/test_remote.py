"""Remote models in the fleet: always ready, never in the way, and never the active one unless somebody chose them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engines.port import Model
from services.gateway.router import GatewayError
from tests.heart.rig import Heart
from tests.heart.stub import GB


@pytest.fixture
def heart():
    """An app at rest, with one remote model, `cloud`."""
    heart = Heart(remote=[Model("cloud", "openai", "gpt-5", aliases=("gpt-5",))])
    yield heart
    heart.close()
    assert heart.scheduler.failures == []


def test_a_remote_model_is_ready_at_once_by_name_and_not_by_auto(heart):
    """No switch is needed, and none happens: its answers cost money, so nobody gets them without asking."""
    assert heart.states() == {"cloud": "running"}
    assert heart.now.active_model is None
    assert heart.router.try_admit("gpt-5").instance.endpoint.model == "gpt-5"
    assert not heart.router.would_switch("cloud")
    with pytest.raises(GatewayError, match="No model is loaded"):
        heart.router.admit("auto")


def test_a_switch_to_a_remote_model_unloads_nothing_and_lasts_beyond_a_restart(heart):
    """It only makes the model the active one, even while no memory is free."""
    heart.ready("large")
    job = heart.ready("cloud")
    assert (job.outcome, job.unloaded, heart.now.active_model) == ("already_loaded", [], "cloud")
    assert heart.router.try_admit("auto").instance.model == "cloud"
    heart.scheduler.pause(1.0)  # the choice is written in the background
    heart.restart()
    heart.until(lambda: heart.now.active_model == "cloud", "the chosen model to be active again")


def test_a_plan_never_counts_on_a_remote_model(heart):
    """It is neither unloaded, nor does it block, nor is it an alternative; its own plan needs nothing."""
    heart.ready("cloud")
    heart.ready("medium")
    plan = heart.switcher.plan("large", "oldest_first")
    assert [unload.model for unload in plan.unload] == ["medium"]
    heart.change("large", required_bytes=99 * GB)
    refused = heart.switcher.plan("large")
    assert not refused.feasible
    assert "cloud" not in {*refused.alternatives, *(blocked.model for blocked in refused.blocked_by)}
    own = heart.switcher.plan("cloud")
    assert (own.feasible, own.required_bytes, own.unload) == (True, 0, ())


def test_what_other_programs_hold_does_not_keep_a_remote_model_out(heart):
    """It needs no memory, so a machine with none free serves it without unloading anything."""
    heart.ready("medium")
    heart.done(heart.switcher.stop("cloud", requested_by="test"))
    heart.machine.others["host"] = 10 * GB
    job = heart.ready("cloud")
    assert (job.outcome, job.unloaded) == ("success", [])


def test_when_the_active_model_is_unloaded_no_remote_one_takes_its_place(heart):
    heart.ready("small")
    heart.done(heart.switcher.stop("small", requested_by="test"))
    assert (heart.states(), heart.now.active_model) == ({"cloud": "running"}, None)


def test_an_unloaded_remote_model_comes_back_with_the_next_request_that_names_it(heart):
    """Until then it stays away, although the engine is polled every second."""
    heart.done(heart.switcher.stop("cloud", requested_by="test"))
    heart.scheduler.pause(5.0)
    assert heart.states() == {}
    admission = heart.router.admit("cloud")
    assert admission.instance.model == "cloud"
    admission.release()
    assert heart.now.active_model is None


def test_a_failed_switch_makes_the_chosen_remote_model_active_again(heart):
    heart.ready("cloud")
    heart.faults("small").crash_loading = True
    assert heart.done(heart.switch("small")).error is not None
    assert heart.now.active_model == "cloud"


def test_a_remote_model_that_nobody_uses_any_more_is_not_active_after_a_restart(heart):
    """It is found loaded again, and was the last active one: without more than that, it became active."""
    heart.ready("cloud")
    heart.done(heart.switcher.stop("cloud", requested_by="test"))
    heart.scheduler.pause(1.0)
    heart.restart()
    heart.scheduler.pause(2.0)
    assert (heart.states(), heart.now.active_model) == ({"cloud": "running"}, None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["switch", "beside", "stop", "crash", "name", "restart"]),
            st.sampled_from(["cloud", "small", "medium", "large"]),
        ),
        max_size=12,
    )
)
def test_a_remote_model_is_active_exactly_while_it_is_the_last_one_chosen(operations):
    """Whatever is loaded, unloaded, crashes or is asked for by name meanwhile, and over restarts of the app."""
    heart, chosen = Heart(remote=[Model("cloud", "openai", "gpt-5")]), False
    for operation, model_id in operations:
        if operation == "switch":
            heart.ready(model_id)
            chosen = model_id == "cloud"
        elif operation == "beside":
            heart.done(heart.switch(model_id, activate=False, auto_unload=False))
        elif operation == "stop":
            heart.done(heart.switcher.stop(model_id, requested_by="test"))
            chosen = chosen and model_id != "cloud"
        elif operation == "crash" and model_id != "cloud":
            heart.engines["solo"].crash(heart.model(model_id))
        elif operation == "name":
            heart.router.admit(model_id).release()
        elif operation == "restart":
            heart.scheduler.pause(1.0)
            heart.restart()
        heart.scheduler.pause(2.0)
        assert (heart.now.active_model == "cloud") == chosen
    heart.close()
