"""A pinned model is not unloaded by anything until its pin ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.pins import NOTE, Pin, Pins
from services.store.errors import StoreLocked
from services.switching.jobs import SwitchError
from tests.heart.rig import Heart

HOUR = 3600.0


@pytest.fixture
def heart() -> Iterator[Heart]:
    heart = Heart(idle_unload_seconds=60, keep_at_least_one=False)
    yield heart
    assert heart.scheduler.failures == []
    heart.close()


def pin(heart: Heart, model: str, seconds: float | None = None, reason: str = "") -> None:
    until = None if seconds is None else heart.scheduler.time() + seconds
    heart.pins.pin(Pin(model, "ci", reason, until))


def test_a_switch_that_needs_its_memory_is_refused_with_who_holds_it(heart):
    heart.ready("small")
    pin(heart, "small", HOUR, "nightly evaluation")
    refused = heart.done(heart.switch("large"))
    assert refused.error.code == "insufficient_memory"
    assert "small (it is pinned by ci until " in refused.error.message
    assert "nightly evaluation" in refused.error.message
    assert heart.states() == {"small": "running"}


def test_nobody_unloads_or_deletes_it_by_hand(heart):
    heart.ready("small")
    pin(heart, "small")
    for ask in (heart.switcher.stop, heart.switcher.remove):
        job = heart.done(ask("small", requested_by="test"))
        assert isinstance(job.error, SwitchError)
        assert job.error.code == "model_pinned"
    assert heart.states() == {"small": "running"}
    heart.pins.unpin("small")
    assert heart.done(heart.switcher.stop("small", requested_by="test")).error is None
    assert heart.states() == {}


def test_one_name_of_a_shared_instance_keeps_all_of_it(heart):
    heart.ready("alpha")
    heart.ready("alpha-too")
    pin(heart, "alpha-too")
    assert heart.done(heart.switcher.stop("alpha", requested_by="test")).error.code == "model_pinned"
    assert [b.reason for b in heart.switcher.plan("large").blocked_by] == ["alpha-too is pinned by ci"]


def test_a_lease_ends_by_itself(heart):
    """Also where the clock is set meanwhile; the idle limit counts from then on like for any other model."""
    heart.ready("small")
    pin(heart, "small", 300)
    heart.pass_time(200)
    assert heart.states() == {"small": "running"}
    assert not heart.switcher.plan("large").feasible
    version = heart.now.version
    heart.pass_time(110)
    assert heart.pins.current == {}
    assert heart.now.version > version or heart.states() == {}
    assert heart.states() == {}


def test_pins_outlast_a_crash(heart):
    heart.ready("beta")
    pin(heart, "beta", HOUR)
    heart.crash()
    assert heart.pins.current["beta"].owner == "ci"
    assert not heart.switcher.plan("large").feasible


def test_a_pin_that_can_not_be_kept_is_none(heart, monkeypatch):
    def fail(_key: str, _value: str) -> None:
        raise StoreLocked("The database is locked.")

    monkeypatch.setattr(heart.store, "put", fail)
    with pytest.raises(StoreLocked):
        pin(heart, "small")
    assert heart.pins.current == {}


@pytest.mark.parametrize("kept", ["nonsense", "[1]", '[{"model": "a"}]', "{}"])
def test_what_can_not_be_read_is_no_pin(heart, kept):
    heart.store.put(NOTE, kept)
    assert Pins(heart.store, scheduler=heart.scheduler).current == {}
