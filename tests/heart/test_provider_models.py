"""Making a job's model ready: a switch like any other, whose time is measured and whose refusal is explained."""

from __future__ import annotations

import pytest

from services.cancellation import Cancelled, CancelToken
from services.providers.adapters.upstream import CatalogModel, Gateway
from services.providers.ports import ProviderError
from tests.heart.rig import Heart
from tests.heart.stub import GB


@pytest.fixture
def heart():
    heart = Heart()
    yield heart
    heart.close()
    assert heart.scheduler.failures == []


def provider(heart: Heart, model_id: str) -> CatalogModel:
    return CatalogModel(
        Gateway(heart.board, heart.catalog, heart.switcher, heart.router, heart.relay, heart.scheduler), model_id
    )


def test_a_job_alternates_between_models_that_do_not_fit_together(heart):
    """Each is switched to when it is needed; the cost is measured, and nothing that fits is unloaded for it."""
    text, image = provider(heart, "medium"), provider(heart, "large")
    assert text.make_ready(CancelToken()) == pytest.approx(2.0, abs=0.5)
    assert text.make_ready(CancelToken()) == 0
    assert image.make_ready(CancelToken()) == pytest.approx(2.0, abs=0.5)
    assert heart.states() == {"large": "running"}
    text.make_ready(CancelToken())
    assert heart.states() == {"medium": "running"}


def test_the_active_model_stays_the_active_one(heart):
    """People who chat meanwhile are not sent to another model."""
    heart.ready("small")
    provider(heart, "medium").make_ready(CancelToken())
    assert heart.now.active_model == "small"


def test_a_switch_waits_for_the_jobs_requests(heart):
    """They are counted like a client's."""
    heart.ready("medium")
    admission = heart.router.admit("medium")
    job = heart.switch("large")
    heart.stage("draining")
    assert heart.states() == {"medium": "running"}
    admission.release()
    heart.done(job)
    assert heart.states() == {"large": "running"}


def test_a_model_that_can_not_fit_is_refused_with_figures(heart):
    """Nothing was unloaded for it."""
    heart.ready("small")
    heart.change("large", required_bytes=99 * GB)
    with pytest.raises(ProviderError, match=r"large needs 99\.0 GB") as caught:
        provider(heart, "large").make_ready(CancelToken())
    assert caught.value.code == "out_of_memory"
    assert heart.states() == {"small": "running"}


def test_a_failed_load_brings_the_previous_models_back(heart):
    """Out of memory while it loads is such a failure; the message has its first cause."""
    heart.ready("medium")
    heart.faults("large").crash_loading = True
    with pytest.raises(ProviderError, match="crashed while loading") as caught:
        provider(heart, "large").make_ready(CancelToken())
    assert caught.value.code == "provider_unavailable"
    assert heart.states() == {"medium": "running"}


def test_where_unloading_has_to_be_confirmed_a_job_says_so():
    heart = Heart(confirm_before_unload=True)
    heart.ready("medium")
    with pytest.raises(ProviderError, match="confirm_before_unload"):
        provider(heart, "large").make_ready(CancelToken())
    heart.close()


def test_a_cancelled_job_leaves_no_switch_behind(heart):
    """One that still waits for another is withdrawn, and its model is never loaded."""
    first = heart.switch("large")
    heart.stage("loading")
    token = CancelToken()
    ended = []

    def wait() -> None:
        try:
            provider(heart, "medium").make_ready(token)
        except Cancelled:
            ended.append(True)

    heart.scheduler.spawn("job", wait)
    heart.until(lambda: heart.now.queued == ("medium",), "the job's switch to wait")
    token.cancel()
    heart.until(lambda: bool(ended), "the job to end")
    heart.done(first)
    assert heart.states() == {"large": "running"}
    assert heart.now.queued == ()


def test_an_unknown_model_is_named(heart):
    with pytest.raises(ProviderError, match="There is no model 'gone'"):
        provider(heart, "gone").make_ready(CancelToken())
