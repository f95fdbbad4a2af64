"""What every engine adapter has to do, on the real engine or a fake: the engine port's contract as tests.

An engine's tests subclass `EngineConformance`, or `PortConformance` if its models generate no text, and define the
fixture `case`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import requests

from services.cancellation import CancelToken
from services.engines.port import (
    STAGE_ORDER,
    Endpoint,
    Engine,
    EngineError,
    Evidence,
    Exit,
    Instance,
    LoadFailed,
    Model,
)
from tests.support.console import wait_until

LOAD_SECONDS = 60.0
GRACE = 5.0


@dataclass
class EngineCase:
    """One engine with two models that load and one that can't; `other` is None if it holds only one at a time.

    `end` ends a loaded model without the engine's involvement; `serves` tells whether an endpoint still has its model.
    `load_seconds` is the time limit of a load and of a first answer. `twin` is another model that shares the good
    model's loaded instance, for engines that support sharing.
    """

    engine: Engine
    good: Model
    other: Model | None
    damaged: Model
    end: Callable[[Instance], object]
    serves: Callable[[Endpoint], bool]
    load_seconds: float = LOAD_SECONDS
    twin: Model | None = None
    exits: list[Exit] = field(default_factory=list)

    def launch(self, model: Model | None = None) -> Instance:
        described = self.engine.describe(model or self.good)
        self.engine.fetch(described, lambda _: None, CancelToken())
        return self.engine.launch(described, self.exits.append)

    @contextmanager
    def ready(self, model: Model | None = None) -> Iterator[tuple[Instance, Endpoint]]:
        """Load and warm up the good model (or the given one); stop it at the end."""
        instance = self.launch(model)
        try:
            endpoint = instance.wait_ready(lambda _: None, self.load_seconds)
            instance.warm_up(self.load_seconds)
            yield instance, endpoint
        finally:
            instance.stop(GRACE)


class PortConformance:
    """The contract of `services.engines.port`, whatever the models do."""

    def test_a_model_is_described_with_its_size_and_an_estimate(self, case: EngineCase):
        """Before any load, the model's size and its memory need are known; the need is marked as estimated."""
        model = case.engine.describe(case.good)
        assert model.fault is None
        assert model.size_bytes
        need = case.engine.estimate(model)
        assert need.bytes >= model.size_bytes
        assert need.basis == "estimated"

    def test_the_same_settings_give_the_same_key(self, case: EngineCase):
        """Measurements are stored under this key; describing the model again does not change it."""
        model = case.engine.describe(case.good)
        assert case.engine.settings_key(model) == case.engine.settings_key(case.engine.describe(case.good))

    def test_sleep_and_wake_work_where_sleep_is_offered_and_fail_elsewhere(self, case: EngineCase):
        """An instance with a sleep footprint wakes at the same endpoint; for others, `sleep` raises EngineError."""
        with case.ready() as (instance, endpoint):
            assert not instance.asleep
            if instance.sleep_footprint() is None:
                with pytest.raises(EngineError):
                    instance.sleep(GRACE)
            else:
                instance.sleep(GRACE)
                assert instance.asleep
                assert instance.wake(lambda _: None, case.load_seconds) == endpoint
                instance.warm_up(case.load_seconds)
            assert not instance.asleep
            assert case.serves(endpoint)

    def test_a_load_reports_stages_in_order_and_ends_at_an_endpoint(self, case: EngineCase):
        """Fractions stay between 0 and 1, and stages never go back."""
        seen: list[Evidence] = []
        instance = case.launch()
        try:
            assert case.serves(instance.wait_ready(seen.append, case.load_seconds))
        finally:
            instance.stop(GRACE)
        stages = [STAGE_ORDER.index(evidence.stage) for evidence in seen]
        assert stages == sorted(stages)
        assert all(evidence.fraction is None or 0 <= evidence.fraction <= 1 for evidence in seen)

    def test_the_memory_of_a_loaded_model_is_measured_on_its_device(self, case: EngineCase):
        """The measurement is for the same device as the estimate."""
        with case.ready() as (instance, _):
            usage = instance.usage()
            assert usage is not None
            assert usage.bytes > 0
            assert usage.device == case.engine.estimate(case.good).device
            assert 0 <= usage.mapped_bytes <= usage.bytes

    def test_stop_ends_the_model_and_reports_no_exit(self, case: EngineCase):
        """After `stop` returns, the model is no longer served; a second stop is harmless, and no exit is reported."""
        with case.ready() as (instance, endpoint):
            assert case.serves(endpoint)
            instance.stop(GRACE)
            assert not case.serves(endpoint)
            instance.stop(GRACE)
        assert case.exits == []

    def test_stopping_a_load_makes_wait_ready_fail(self, case: EngineCase):
        """After `stop` from another thread, `wait_ready` raises LoadFailed, and no exit is reported."""
        instance = case.launch()
        stopper = threading.Thread(target=instance.stop, args=(GRACE,), daemon=True)
        stopper.start()
        stopper.join()
        with pytest.raises(LoadFailed):
            instance.wait_ready(lambda _: None, case.load_seconds)
        assert case.exits == []

    def test_an_unexpected_exit_is_reported_once_with_its_cause(self, case: EngineCase):
        """The report has a readable cause, and stopping the instance afterwards reports no second exit."""
        with case.ready() as (instance, endpoint):
            case.end(instance)
            wait_until(lambda: bool(case.exits), "the exit to be reported")
            assert not case.serves(endpoint)
        assert len(case.exits) == 1
        assert len(case.exits[0].cause) > 10

    def test_a_damaged_model_fails_with_its_cause(self, case: EngineCase):
        """Whether the damage is found before or during the load, the error has a readable message."""
        with pytest.raises(EngineError) as caught:
            _load(case, case.damaged)
        assert len(str(caught.value)) > 20


class EngineConformance(PortConformance):
    """The contract of an engine whose models generate text and can be loaded side by side."""

    def test_the_endpoint_of_a_ready_model_lists_it(self, case: EngineCase):
        """The endpoint lists the model as soon as it is ready."""
        instance = case.launch()
        try:
            endpoint = instance.wait_ready(lambda _: None, case.load_seconds)
            listed = requests.get(f"{endpoint.origin}/v1/models", headers=dict(endpoint.headers), timeout=5).json()
            assert (endpoint.model or case.good.id) in [m["id"] for m in listed["data"]]
        finally:
            instance.stop(GRACE)

    def test_a_warm_model_answers_with_and_without_streaming(self, case: EngineCase):
        """Chat completions have OpenAI's format, streamed and not."""
        with case.ready() as (_, endpoint):
            whole = _ask(endpoint, stream=False).json()
            assert whole["choices"][0]["message"]["content"]
            lines = _ask(endpoint, stream=True).text.split("\n\n")
            assert "data: [DONE]" in lines

    def test_two_models_can_be_loaded_at_once(self, case: EngineCase):
        """Each model answers at its own endpoint."""
        with case.ready() as (_, first), case.ready(case.other) as (_, second):
            assert (first.origin, first.model) != (second.origin, second.model)
            assert _ask(first, stream=False).json()["choices"]
            assert _ask(second, stream=False).json()["choices"]


class SharingConformance:
    """The additional contract of an engine that serves several models from one instance: `case.twin` is the second."""

    @pytest.fixture
    def twins(self, case: EngineCase) -> tuple[Model, Model]:
        """The good model and its twin, as described for the catalogue."""
        assert case.twin is not None
        return case.engine.describe(case.good), case.engine.describe(case.twin)

    def test_models_that_share_memory_have_the_same_held_as(self, case: EngineCase, twins: tuple[Model, Model]):
        """It is known before any load, so shared memory isn't counted twice; unrelated models have another value."""
        good, twin = twins
        assert good.held_as is not None
        assert good.held_as == twin.held_as
        assert case.other is not None
        assert case.engine.describe(case.other).held_as != good.held_as

    def test_a_twin_of_a_loaded_model_is_ready_and_answers_under_its_own_name(self, case: EngineCase):
        """Both share one process and report the same memory; loading the twin reports no exit of the first model."""
        with case.ready() as (first, one), case.ready(case.twin) as (second, two):
            assert one.model != two.model
            assert first.model.held_as == second.model.held_as is not None
            assert first.pid == second.pid
            assert _ask(one, stream=False).json()["choices"]
            assert _ask(two, stream=False).json()["choices"]
            used = first.usage(), second.usage()
            assert used[0] is not None
            assert used[1] is not None
            assert used[0].bytes == pytest.approx(used[1].bytes, rel=0.2)
            assert case.exits == []

    def test_all_models_served_by_one_instance_are_found_loaded(self, case: EngineCase, twins: tuple[Model, Model]):
        """Loading one name makes its twin loaded too; the twin can be adopted, and it answers."""
        with case.ready():
            found = case.engine.loaded(twins)
            assert {model.id for model in found} == {model.id for model in twins}
            adopted = case.engine.adopt(twins[1], case.exits.append)
            assert adopted is not None
            assert _ask(adopted.wait_ready(lambda _: None, 0), stream=False).json()["choices"]

    def test_stopping_the_twin_ends_both_and_reports_the_exit_of_the_other(
        self, case: EngineCase, twins: tuple[Model, Model]
    ):
        """After the twin is stopped, neither is loaded; the first model's exit is reported once and names the twin."""
        with case.ready(), case.ready(case.twin) as (second, _):
            second.stop(GRACE)
            wait_until(lambda: bool(case.exits), "the end of the twin to be told")
            assert not case.engine.loaded(twins)
        assert len(case.exits) == 1
        assert case.exits[0].released
        assert twins[1].id in case.exits[0].cause

    def test_an_unload_by_another_client_ends_all_twins(self, case: EngineCase):
        """Each twin reports one exit."""
        with case.ready() as (first, _), case.ready(case.twin):
            case.end(first)
            wait_until(lambda: len(case.exits) == 2, "both exits to be reported")
        assert [exit.released for exit in case.exits] == [True, True]


def _load(case: EngineCase, model: Model) -> None:
    instance = case.launch(model)
    try:
        instance.wait_ready(lambda _: None, case.load_seconds)
    finally:
        instance.stop(GRACE)


def _ask(endpoint: Endpoint, *, stream: bool) -> requests.Response:
    question = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "stream": stream,
        "temperature": 0,
    }
    answer = requests.post(
        f"{endpoint.origin}/v1/chat/completions", json=question, headers=dict(endpoint.headers), timeout=30
    )
    assert answer.status_code == 200, answer.text
    return answer
