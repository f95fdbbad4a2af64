"""What a switch does, step by step, on in-memory engines."""

from __future__ import annotations

import pytest

from services.gateway.router import GatewayError
from services.switching.jobs import SwitchError
from tests.heart.rig import Heart
from tests.heart.stub import model


@pytest.fixture
def heart():
    """An app at rest, with nothing loaded."""
    heart = Heart()
    yield heart
    heart.close()
    assert heart.scheduler.failures == []


def test_an_image_model_that_is_loaded_never_becomes_the_active_one(heart):
    """Neither as the only one, nor when the active one is unloaded, nor after a restart of the app."""
    heart.ready("painter")
    assert (heart.states(), heart.now.active_model) == ({"painter": "running"}, None)
    assert heart.router.try_admit("painter", "text") is None
    heart.ready("small")
    heart.ready("painter")
    assert (heart.states(), heart.now.active_model) == ({"painter": "running", "small": "running"}, "small")
    heart.done(heart.switcher.stop("small", requested_by="test"))
    assert (heart.states(), heart.now.active_model) == ({"painter": "running"}, None)
    heart.restart()
    assert (heart.states(), heart.now.active_model) == ({"painter": "running"}, None)


def test_a_model_on_another_programs_server_is_never_evicted():
    """The plan says why it stays."""
    heart = Heart(models=(model("theirs", "solo", 5, started_elsewhere=True), model("large", "solo", 9)))
    heart.ready("theirs")
    failed = heart.done(heart.switch("large"))
    assert (failed.error.code, heart.states()) == ("insufficient_memory", {"theirs": "running"})
    assert [blocked.reason for blocked in failed.plan.blocked_by] == ["another program started its server"]
    heart.close()


def test_a_request_that_names_no_model_does_not_wait_for_an_image_model(heart):
    heart.switch("painter")
    with pytest.raises(GatewayError, match="No model is loaded"):
        heart.router.admit("auto")


def test_a_switch_loads_its_target_and_makes_it_the_active_one(heart):
    """Requests are routed to it only after its first token."""
    job = heart.switch("small")
    heart.stage("warming_up")
    assert heart.router.try_admit("small") is None
    heart.done(job)
    assert (job.outcome, heart.states(), heart.now.active_model) == ("success", {"small": "running"}, "small")
    admission = heart.router.try_admit("auto")
    assert admission is not None
    assert admission.instance.model == "small"


def test_models_in_the_way_are_unloaded_and_reported(heart):
    """`large` needs 9 of 10 GB, so both others are unloaded."""
    heart.ready("small")
    heart.ready("medium")
    job = heart.ready("large")
    assert sorted(job.unloaded) == ["medium", "small"]
    assert heart.states() == {"large": "running"}


def test_a_target_that_can_not_fit_is_refused_before_anything_is_unloaded(heart):
    """Other programs hold 5 GB: unloading models would not help."""
    heart.ready("small")
    heart.machine.others["host"] = 5_000_000_000
    job = heart.done(heart.switch("large"))
    assert job.error is not None
    assert job.error.code == "insufficient_memory"
    assert heart.states() == {"small": "running"}


def test_a_refusal_names_the_program_in_the_way_and_no_model_that_is_loaded(heart):
    """Other programs hold 5 of 10 GB. Alternatives: `small`, not `beta` (too large) or `medium` (loaded)."""
    heart.ready("medium")
    heart.machine.others["host"] = 5_000_000_000
    job = heart.done(heart.switch("large"))
    assert job.error.code == "insufficient_memory"
    assert "Other programs hold 5.0 GB, the largest of them hog (process 4242, 5.0 GB)." in job.error.message
    assert "medium" not in job.error.message.replace("medium is still running.", "")
    assert "medium" not in job.error.details["plan"].alternatives
    (event,) = [event for event in job.follow() if event is not None and event.name == "error"]
    (limit,) = event.data["limits"]
    assert (limit["limit"], limit["gb"], limit["short_gb"]) == ("other_programs", 5.0, 4.0)
    assert limit["programs"] == [{"name": "hog", "pids": [4242], "gb": 5.0}]


def test_a_failed_load_restores_what_was_unloaded_and_reports_both(heart):
    """The error has the first cause with the log tail, and what is running now."""
    heart.ready("medium")
    heart.faults("large").crash_loading = True
    job = heart.done(heart.switch("large"))
    assert job.error is not None
    assert (job.error.code, job.error.details["log_tail"]) == ("load_failed", "the last words")
    assert "crashed while loading" in job.error.message
    assert "medium is running again" in job.error.message
    assert (heart.states(), heart.now.active_model) == ({"medium": "running"}, "medium")
    assert "large" in heart.now.failures


@pytest.mark.parametrize(
    "stage", ["checking_memory", "draining", "unloading", "waiting_for_memory", "loading", "warming_up"]
)
def test_a_cancel_at_any_stage_leaves_what_ran_before(heart, stage):
    """Whatever the stage: a draining model continues, an unloaded one is restored."""
    heart.ready("medium")
    admission = heart.router.try_admit("medium")
    heart.faults("medium").slow_stop = 3
    heart.machine.slow_seconds = 0.2
    job = heart.switch("large")
    if stage not in ("checking_memory", "draining"):
        admission.release()
    heart.stage(stage)
    assert heart.switcher.cancel() is job
    heart.done(job)
    assert (job.outcome, heart.states(), heart.now.active_model) == ("cancelled", {"medium": "running"}, "medium")
    assert heart.router.try_admit("medium") is not None, "it takes requests again"


def test_a_superseding_switch_that_fails_restores_what_ran_before_the_first(heart):
    """Switch to B, then to C, and C fails: A is restored. (It was lost.)"""
    heart.ready("medium")
    first = heart.switch("large")
    heart.stage("loading")
    heart.faults("snorer").crash_loading = True
    second = heart.done(heart.switch("snorer"))
    assert (first.outcome, second.outcome) == ("cancelled", "failed")
    assert "medium is running again" in second.error.message
    assert (heart.states(), heart.now.active_model) == ({"medium": "running"}, "medium")


@pytest.mark.parametrize("stage", ["unloading", "loading"])
def test_cancelling_a_superseding_switch_restores_what_ran_before_the_first(heart, stage):
    """Switch to B, then to C, then cancel, even while B is still being stopped: A is restored. (It was lost.)"""
    heart.ready("medium")
    heart.faults("medium").slow_stop = 3
    heart.faults("large").slow_stop = 3
    heart.switch("large")
    heart.stage(stage)
    second = heart.switch("snorer")
    heart.scheduler.settle()
    assert heart.switcher.cancel() is second
    heart.done(second)
    assert (second.outcome, heart.states(), heart.now.active_model) == ("cancelled", {"medium": "running"}, "medium")


def test_a_switch_that_supersedes_a_rollback_inherits_what_is_not_back_yet(heart):
    """Each switch of a chain supersedes the rollback of the one before."""
    heart.ready("medium")
    heart.faults("large").crash_loading = True
    heart.switch("large")
    heart.stage("rolling_back")
    heart.faults("snorer").crash_loading = True
    last = heart.done(heart.switch("snorer"))
    assert last.outcome == "failed"
    assert heart.states() == {"medium": "running"}


def test_what_a_superseded_rollback_could_not_restore_is_tried_by_its_successor(heart):
    """Found by the random walk: the superseded switch's failure was dropped, and the model with it."""
    heart.ready("beta")
    heart.ready("small")
    heart.faults("large").crash_loading = True
    heart.switch("large")
    heart.stage("loading")
    heart.faults("small").refuse_launch = True
    heart.stage("rolling_back")
    heart.until(lambda: "small" in heart.now.failures, "small to be refused, while beta is still to be restored")
    heart.faults("snorer").crash_loading = True
    last = heart.switch("snorer")
    heart.faults("small").refuse_launch = False
    heart.done(last)
    assert heart.states() == {"beta": "running", "small": "running"}


def test_the_last_switch_of_a_chain_reports_all_that_was_unloaded(heart):
    """`medium` was unloaded for `large`, which was superseded; the result of the last switch includes it."""
    heart.ready("medium")
    heart.switch("large")
    heart.stage("loading")
    assert heart.ready("snorer").unloaded == ["medium"]


def test_a_model_unloaded_by_hand_meanwhile_is_not_restored(heart):
    """`stop` removes the model from what a failed switch restores."""
    heart.ready("medium")
    heart.faults("large").crash_loading = True
    job = heart.switch("large")
    heart.stage("loading")
    heart.switcher.stop("medium", requested_by="test")
    heart.done(job)
    assert heart.states() == {}


def test_a_model_that_exits_the_moment_it_is_ready_is_not_shown(heart):
    """Its exit comes while the job still handles it: the load fails with that cause."""
    heart.faults("small").crash_when_ready = True
    job = heart.done(heart.switch("small"))
    assert job.error is not None
    assert "exit code 3" in job.error.message
    assert heart.states() == {}


def test_a_model_that_can_not_be_restored_does_not_stop_the_rollback(heart):
    """A rollback restores models one by one, keeps the first cause, and says why one is missing."""
    heart.ready("small")
    heart.ready("medium")
    heart.faults("large").crash_loading = True
    heart.faults("medium").refuse_launch = True
    job = heart.done(heart.switch("large"))
    assert job.error.code == "load_failed"
    assert "medium was unloaded and is not back: The engine refuses to begin." in job.error.message
    assert heart.states() == {"small": "running"}


@pytest.mark.parametrize("strategy", ["largest_first", "oldest_first", "preserve_favorites", "cheapest_reload"])
def test_preserved_models_stay_under_every_strategy(strategy):
    """`preserve_models` is a guarantee, not a strategy. (Only one strategy respected it.)"""
    heart = Heart(preserve_models=("medium",))
    heart.ready("medium")
    job = heart.done(heart.switch("large", strategy=strategy))
    assert job.error.code == "insufficient_memory"
    assert "medium (it is one of preserve_models)" in job.error.message
    assert heart.states() == {"medium": "running"}
    heart.close()


def test_a_refused_or_unconfirmed_target_does_not_cost_the_switch_under_way():
    """A target that would be refused is refused at once; the load under way continues."""
    heart = Heart(confirm_before_unload=True)
    heart.ready("medium")
    first = heart.switch("snorer")
    heart.stage("loading")
    second = heart.done(heart.switch("large"))
    assert second.error.code == "confirmation_required"
    assert second.error.details["plan"].unload[0].model == "medium"
    assert heart.done(first).outcome == "success"
    heart.close()


def test_an_estimate_that_fails_for_one_model_ends_no_job_of_another(heart):
    """A model whose estimate fails is left out of the alternatives. (It failed other models' jobs.)"""
    heart.faults("beta").refuse_estimate = True
    assert heart.ready("small").outcome == "success"
    job = heart.done(heart.switch("beta"))
    assert job.error.code == "internal_error"
    assert heart.states() == {"small": "running"}


def test_a_failing_database_does_not_fail_a_load(heart):
    """Only the learned figures of the load are lost."""
    heart.store.failing = True
    assert heart.ready("small").outcome == "success"


def test_an_unwritable_state_folder_is_detected_before_anything_is_unloaded(heart):
    """A full disk must not unload the running model."""
    heart.ready("medium")
    heart.state_error = "The state folder /state can't be written: No space left on device."
    job = heart.done(heart.switch("large"))
    assert job.error.code == "state_unwritable"
    assert "No space left" in job.error.message
    assert heart.states() == {"medium": "running"}


def test_a_loaded_model_whose_file_was_removed_stays_listed_and_can_be_stopped(heart):
    """It holds memory and answers `auto`, so people must be able to see and unload it."""
    heart.ready("small")
    del heart.engines["solo"].listed["small"]
    heart.catalog.refresh()
    assert "files are gone" in heart.catalog.get("small").fault
    assert heart.router.try_admit("small") is not None
    heart.router.try_admit("small")
    heart.faults("medium")
    assert heart.done(heart.switcher.stop("small", requested_by="test")).outcome == "success"
    assert heart.states() == {}
    assert "small" not in heart.catalog.models


def test_a_queued_model_that_is_deleted_fails_only_its_own_job(heart):
    """The job ends with `model_not_found`; the switcher raises nothing."""
    first = heart.switch("small")
    second = heart.switch("medium", replace="queue")
    del heart.engines["solo"].listed["medium"]
    heart.catalog.refresh()
    heart.done(first)
    assert heart.done(second).error.code == "model_not_found"


def test_the_queue_is_published_whenever_it_changes(heart):
    """A finished switch stayed in the queue as "Next: good" for ever."""
    first = heart.switch("small")
    second = heart.switch("medium", replace="queue")
    heart.until(lambda: heart.now.queued == ("medium",), "the queue")
    heart.done(first)
    heart.until(lambda: heart.now.queued == (), "the queue to empty")
    heart.done(second)


def test_a_switch_that_joins_a_start_keeps_its_own_right_to_unload(heart):
    """A start may not unload; a switch that joins it may."""
    heart.ready("medium")
    blocking = heart.switch("snorer")
    start = heart.switch("large", replace="queue", auto_unload=False, activate=False)
    joined = heart.switch("large", replace="queue")
    assert joined is start
    heart.done(blocking)
    assert heart.done(joined).outcome == "success"
    assert (heart.states()["large"], heart.now.active_model) == ("running", "large")


def test_a_rollback_does_not_reload_a_running_model(heart):
    """If another client has loaded the model meanwhile, it counts as restored."""
    heart.ready("beta")
    heart.faults("large").crash_loading = True
    job = heart.switch("large")
    heart.stage("loading")
    heart.engines["shared"].load_by_other(heart.model("beta"))
    heart.done(job)
    assert heart.states() == {"beta": "running"}
    assert len(heart.engines["shared"].instances) == 1


def test_a_target_that_another_client_loaded_meanwhile_is_noticed(heart):
    """It already answers, so nothing is loaded."""
    heart.engines["shared"].load_by_other(heart.model("beta"))
    job = heart.done(heart.switch("beta"))
    assert job.outcome == "already_loaded"
    assert heart.now.active_model == "beta"


@pytest.mark.parametrize("stage", ["draining", "unloading", "loading"])
def test_a_cancelled_restart_restores_the_model(heart, stage):
    """A cancel at any stage leaves the restarted model loaded."""
    heart.ready("medium")
    heart.faults("medium").slow_stop = 3
    admission = heart.router.try_admit("medium")
    job = heart.switcher.restart("medium", requested_by="test")
    if stage != "draining":
        admission.release()
    heart.stage(stage)
    heart.switcher.cancel()
    heart.done(job)
    assert (job.outcome, heart.states(), heart.now.active_model) == ("cancelled", {"medium": "running"}, "medium")


def test_a_failed_restart_reports_that_the_model_is_not_back(heart):
    """The load is not retried for ever, and the error says so."""
    heart.ready("medium")
    heart.faults("medium").crash_loading = True
    job = heart.done(heart.switcher.restart("medium", requested_by="test"))
    assert "medium was unloaded and is not back" in job.error.message
    assert heart.states() == {}


def test_a_disconnected_client_causes_no_switch(heart):
    """It is removed from the queue, and the model in use stays loaded."""
    heart.ready("medium")
    blocking = heart.switch("snorer")
    left: list[bool] = []
    outcome: list[str] = []

    def ask() -> None:
        try:
            heart.router.admit("large", lambda: bool(left))
        except Exception as error:
            outcome.append(type(error).__name__)

    heart.scheduler.spawn("client", ask)
    heart.until(lambda: heart.now.queued == ("large",), "the request to wait")
    left.append(True)
    heart.until(lambda: bool(outcome), "the request to end")
    heart.done(blocking)
    heart.scheduler.pause(30)
    assert outcome == ["ClientGone"]
    assert heart.states() == {"medium": "running", "snorer": "running"}


def test_two_names_of_one_instance_are_counted_once_and_unloaded_together(heart):
    """Switching to the second name needs no load and no memory."""
    heart.ready("alpha")
    heart.scheduler.pause(2)
    assert heart.states() == {"alpha": "running", "alpha-too": "running"}
    assert heart.ready("alpha-too").outcome == "already_loaded"
    assert heart.planner.account("host", heart.switcher._fleet.holdings()).used_bytes == 3_000_000_000
    assert heart.ready("large").unloaded == ["alpha"]
    assert heart.states() == {"large": "running"}


def test_a_cancel_applies_only_to_the_switch_it_names(heart):
    """A late click does not cancel the next switch."""
    first = heart.ready("small")
    second = heart.switch("medium")
    assert heart.switcher.cancel(switch_id=first.id) is None
    assert heart.switcher.cancel(switch_id=second.id) is second
    assert heart.done(second).outcome == "cancelled"


def test_the_replaced_model_is_unloaded_even_if_the_target_is_loaded(heart):
    """Seed 002's switch always unloads the old model."""
    heart.ready("beta")
    heart.ready("alpha")
    job = heart.ready("beta", instead_of="alpha")
    assert (job.outcome, job.unloaded) == ("success", ["alpha"])
    assert heart.states() == {"beta": "running"}


def test_a_model_that_the_engine_refuses_to_unload_stays_usable(heart):
    """It keeps answering, and the error says why it was not unloaded."""
    heart.ready("medium")
    heart.faults("medium").refuse_unload = True
    job = heart.done(heart.switcher.stop("medium", requested_by="test"))
    assert "refuses to unload" in job.error.message
    assert heart.states() == {"medium": "running"}
    admission = heart.router.try_admit("medium")
    assert admission is not None


def test_the_plan_shows_busy_models_and_counts_their_drain(heart):
    """A busy model has `in_flight`, and the estimated time includes its drain."""
    heart.ready("large")
    heart.done(heart.switcher.stop("large", requested_by="test"))
    heart.ready("medium")
    idle = heart.switcher.plan("large")
    assert heart.router.try_admit("medium") is not None
    busy = heart.switcher.plan("large")
    assert busy.unload[0].in_flight == 1
    assert busy.estimated_seconds == idle.estimated_seconds + heart.settings.drain_timeout_seconds


def test_a_draining_model_shows_until_when_it_may_drain(heart):
    """`drain_timeout_seconds` at most; it is unloaded as soon as its last answer ends."""
    heart.ready("medium")
    admission = heart.router.try_admit("medium")
    job = heart.switcher.stop("medium", requested_by="test")
    heart.scheduler.settle()
    until = heart.now.instances["medium"].drain_until
    assert until == heart.scheduler.time() + heart.settings.drain_timeout_seconds
    heart.scheduler.pause(6)
    assert heart.now.instances["medium"].drain_until == until
    admission.release()
    heart.done(job)
    assert heart.states() == {}


@pytest.mark.parametrize("how", ["stop", "switch"])
def test_unload_now_cuts_off_the_last_answers(heart, how):
    """The answer under way is aborted, and the job that waited for it continues at once."""
    heart.ready("medium")
    request = heart.ask("medium", "sse", 1000.0)
    heart.scheduler.pause(1)
    job = heart.switcher.stop("medium", requested_by="test") if how == "stop" else heart.switch("large")
    heart.scheduler.pause(2)
    began = heart.scheduler.now()
    heart.switcher.unload_now("medium")
    heart.until(lambda: "medium" not in heart.states(), "the model to be gone")
    assert heart.scheduler.now() - began < 1
    heart.done(job)
    assert job.outcome == "success"
    assert request.outcome == "aborted"


def test_unload_now_without_a_drain_aborts_nothing(heart):
    """Neither before a drain, nor, after a cancelled one, at the next."""
    heart.ready("medium")
    admission = heart.router.try_admit("medium")
    heart.switcher.unload_now("medium")
    job = heart.switch("large")
    heart.stage("draining")
    heart.switcher.unload_now("large")
    heart.switcher.cancel()
    heart.done(job)
    assert heart.now.instances["medium"].drain_until is None
    heart.switch("large")
    heart.stage("draining")
    heart.scheduler.pause(2)
    assert heart.states()["medium"] == "running"
    admission.release()


def test_a_cancelled_switch_shows_that_until_it_has_ended(heart):
    """At once, whatever progress the stopping load still reports; then the rollback is shown."""
    heart.ready("medium")
    heart.faults("large").slow_stop = 3
    job = heart.switch("large")
    heart.stage("loading")
    heart.switcher.cancel()
    assert heart.now.switch.stage == "cancelling"
    seen = []
    heart.until(lambda: bool(heart.now.switch and seen.append(heart.now.switch.stage)) or job.done, "the end")
    assert list(dict.fromkeys(seen)) == ["cancelling", "rolling_back"]


def test_a_model_that_exits_by_itself_is_shown_with_the_cause(heart):
    """Until the notice is dismissed, or the model is loaded again."""
    heart.ready("medium")
    heart.ready("small")
    heart.engines["solo"].crash(heart.model("medium"))
    heart.scheduler.settle()
    loss = heart.now.loss
    assert (loss.model, loss.at) == ("medium", heart.scheduler.time())
    assert loss.cause == heart.now.failures["medium"].cause
    heart.switcher.dismiss()
    assert heart.now.loss is None
    heart.engines["solo"].crash(heart.model("small"))
    heart.scheduler.settle()
    assert heart.now.loss.model == "small"
    heart.ready("small")
    assert heart.now.loss is None


def test_the_time_of_last_use_survives_an_unload(heart):
    """It stays in the snapshot after the instance is gone."""
    heart.ready("small")
    heart.router.try_admit("small").release()
    used = heart.now.instances["small"].traffic.last_used
    heart.done(heart.switcher.stop("small", requested_by="test"))
    assert heart.now.last_used["small"] == used


def test_other_models_can_be_unloaded_during_a_download(heart):
    """A download may take hours; a fetching job gives up its slot."""
    heart.ready("medium")
    heart.faults("snorer").fetch_seconds = 600
    fetching = heart.switch("snorer")
    heart.stage("downloading")
    stopped = heart.done(heart.switcher.stop("medium", requested_by="test"))
    assert stopped.outcome == "success"
    assert not fetching.done
    assert heart.done(fetching).outcome == "success"


def test_a_hanging_driver_delays_only_what_needs_it(heart):
    """While reading memory takes a minute, a cancel, a request to a running model and the status work at once."""
    heart.ready("small")
    heart.machine.slow_seconds = 60
    job = heart.switch("medium")
    heart.scheduler.pause(1)
    began = heart.scheduler.now()
    assert heart.router.try_admit("small") is not None
    assert heart.switcher.cancel() is job
    assert heart.scheduler.now() == began


def test_an_exception_in_a_message_reaches_only_its_sender(heart):
    """The mailbox handles the next message."""
    with pytest.raises(ZeroDivisionError):
        heart.switcher._mailbox.call(lambda: 1 / 0)
    assert heart.ready("small").outcome == "success"


def test_two_equal_switch_requests_are_one_job(heart):
    """Such as a double click, or a second tab."""
    first = heart.switch("small")
    assert heart.switch("small") is first
    heart.done(first)


def test_a_switch_can_be_refused_while_one_runs(heart):
    """With `replace="refuse"` the second switch is refused."""
    first = heart.switch("small")
    with pytest.raises(SwitchError, match="still under way"):
        heart.switch("medium", replace="refuse")
    heart.done(first)


def test_after_a_crash_loaded_models_are_adopted_and_half_loaded_ones_are_gone(heart):
    """The active model stays the active one."""
    heart.ready("medium")
    heart.ready("beta")
    heart.switch("snorer")
    heart.stage("loading")
    heart.crash()
    assert heart.states() == {"medium": "running", "beta": "running"}
    assert heart.now.active_model == "beta"


def test_a_model_sleeps_for_another_and_is_loaded_again_if_it_can_not_wake(heart):
    """The plan chooses sleep, which is a state of its own."""
    heart.ready("dozer")
    heart.ready("snorer")
    assert heart.states() == {"dozer": "asleep", "snorer": "running"}
    heart.faults("dozer").refuse_wake = True
    heart.ready("dozer")
    assert heart.states()["dozer"] == "running"


def test_percent_and_time_left_agree_with_a_forecast(heart):
    """Percent is elapsed over forecast time: after three quarters of a typical load it is about 75 %."""
    for _ in range(2):
        heart.ready("small")
        heart.done(heart.switcher.stop("small", requested_by="test"))
    heart.engines["solo"].load_seconds = 2.0
    job = heart.switch("small")
    heart.stage("loading")
    began = heart.scheduler.now()
    heart.scheduler.pause(1.5)
    view = heart.now.switch
    assert view.eta_seconds is not None
    elapsed = heart.scheduler.now() - began
    assert abs(view.percent - 100 * elapsed / (elapsed + view.eta_seconds)) <= 15
    assert 60 <= view.percent <= 90
    heart.done(job)


def test_the_forecast_includes_the_download(heart):
    """It uses the speed of earlier downloads; before the first one it is unknown."""
    heart.ready("snorer")
    heart.done(heart.switcher.stop("snorer", requested_by="test"))
    heart.change("snorer", fetch_bytes=7_000_000_000)
    assert heart.switcher.plan("snorer").estimated_seconds is None
    heart.faults("snorer").fetch_seconds = 70
    heart.ready("snorer")
    heart.done(heart.switcher.stop("snorer", requested_by="test"))
    assert heart.switcher.plan("snorer").estimated_seconds == pytest.approx(72, abs=1)


def test_a_switch_is_shown_as_soon_as_it_is_accepted(heart):
    """A script that asks right after its request must see the switch."""
    job = heart.switch("small")
    assert heart.now.switch is not None
    assert (heart.now.switch.id, heart.now.switch.stage) == (job.id, "requested")
    heart.done(job)
    again = heart.done(heart.switch("small"))
    assert (again.outcome, heart.now.switch) == ("already_loaded", None)


def test_closing_a_switcher_that_was_never_started_returns_at_once(heart):
    """If the app's start fails, nothing answers the mailbox: closing waited ten seconds for it."""
    heart.build()
    before = heart.scheduler.now()
    heart.switcher.close()
    assert heart.scheduler.now() == before
