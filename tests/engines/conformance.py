"""What every engine adapter, on the real engine or a fake, has to do: the port's promises as tests.

An engine joins by a subclass of `EngineConformance` with a fixture `case`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import requests

from services.cancellation import CancelToken
from services.engines.port import Endpoint, Engine, EngineError, Evidence, Exit, Instance, LoadFailed, Model
from services.switching.progress import ORDER
from tests.support.console import wait_until

LOAD_SECONDS = 60.0
GRACE = 5.0


@dataclass
class EngineCase:
    """One engine with two models that load and one that can't.

    `end` takes a loaded one away behind the engine's back; `serves` tells whether an endpoint still has its model.
    `load_seconds` is how long a load, or a first answer, may take. `twin` is another name for what the good model is in
    memory, where the engine knows such; its answers differ in nothing that a load could tell.
    """

    engine: Engine
    good: Model
    other: Model
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
        """The good model (or another), loaded and warm; stopped at the end."""
        instance = self.launch(model)
        try:
            endpoint = instance.wait_ready(lambda _: None, self.load_seconds)
            instance.warm_up(self.load_seconds)
            yield instance, endpoint
        finally:
            instance.stop(GRACE)


class EngineConformance:
    """The promises of `services.engines.port`."""

    def test_a_model_is_described_with_its_size_and_an_estimate(self, case: EngineCase):
        """Before any load: how large it is and what it will take, labelled estimated."""
        model = case.engine.describe(case.good)
        assert model.fault is None
        assert model.size_bytes
        need = case.engine.estimate(model)
        assert need.bytes >= model.size_bytes
        assert need.basis == "estimated"

    def test_settings_that_change_a_load_change_its_key(self, case: EngineCase):
        """What was learned under other settings is not mixed in; the same settings give the same key."""
        model = case.engine.describe(case.good)
        assert case.engine.settings_key(model) == case.engine.settings_key(case.engine.describe(case.good))

    def test_what_can_sleep_wakes_and_what_can_not_says_so(self, case: EngineCase):
        """It offers a rest only if it can take one; an order to sleep that it can't follow is an EngineError."""
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

    def test_a_load_reports_stages_in_order_and_ends_at_an_endpoint_that_lists_the_model(self, case: EngineCase):
        """Readiness is the engine's own word; fractions stay between 0 and 1 and stages don't go back."""
        seen: list[Evidence] = []
        instance = case.launch()
        try:
            endpoint = instance.wait_ready(seen.append, case.load_seconds)
            listed = requests.get(f"{endpoint.origin}/v1/models", headers=dict(endpoint.headers), timeout=5).json()
            assert (endpoint.model or case.good.id) in [m["id"] for m in listed["data"]]
        finally:
            instance.stop(GRACE)
        stages = [ORDER.index(evidence.stage) for evidence in seen]
        assert stages == sorted(stages)
        assert all(evidence.fraction is None or 0 <= evidence.fraction <= 1 for evidence in seen)

    def test_after_the_warm_up_it_answers_whole_and_streamed(self, case: EngineCase):
        """Chat completions in OpenAI's shape, with and without a stream."""
        with case.ready() as (_, endpoint):
            whole = _ask(endpoint, stream=False).json()
            assert whole["choices"][0]["message"]["content"]
            lines = _ask(endpoint, stream=True).text.split("\n\n")
            assert "data: [DONE]" in lines

    def test_what_it_holds_is_measured_on_its_device(self, case: EngineCase):
        """A reading, on the device that the estimate named."""
        with case.ready() as (instance, _):
            usage = instance.usage()
            assert usage is not None
            assert usage.bytes > 0
            assert usage.device == case.engine.estimate(case.good).device
            assert 0 <= usage.mapped_bytes <= usage.bytes

    def test_stopping_ends_it_for_good_and_tells_nobody(self, case: EngineCase):
        """After `stop` returns it is served no more, a second stop is harmless, and it is no unexpected exit."""
        with case.ready() as (instance, endpoint):
            assert case.serves(endpoint)
            instance.stop(GRACE)
            assert not case.serves(endpoint)
            instance.stop(GRACE)
        assert case.exits == []

    def test_stopping_a_load_makes_the_waiting_one_fail(self, case: EngineCase):
        """`stop` from another thread: `wait_ready` raises, and no exit is reported."""
        instance = case.launch()
        stopper = threading.Thread(target=instance.stop, args=(GRACE,), daemon=True)
        stopper.start()
        stopper.join()
        with pytest.raises(LoadFailed):
            instance.wait_ready(lambda _: None, case.load_seconds)
        assert case.exits == []

    def test_an_exit_nobody_asked_for_is_reported_once_with_its_cause(self, case: EngineCase):
        """Whoever took the model away: it is noticed, in words, and not told again when it is stopped after that."""
        with case.ready() as (instance, endpoint):
            case.end(instance)
            wait_until(lambda: bool(case.exits), "the exit to be reported")
            assert not case.serves(endpoint)
        assert len(case.exits) == 1
        assert len(case.exits[0].cause) > 10

    def test_a_damaged_model_fails_with_its_cause(self, case: EngineCase):
        """Whether it is noticed before or while loading: an error in words, and nothing left running."""
        with pytest.raises(EngineError) as caught:
            _load(case, case.damaged)
        assert len(str(caught.value)) > 20

    def test_two_models_can_be_loaded_at_once(self, case: EngineCase):
        """Each answers where its endpoint says."""
        with case.ready() as (_, first), case.ready(case.other) as (_, second):
            assert (first.origin, first.model) != (second.origin, second.model)
            assert _ask(first, stream=False).json()["choices"]
            assert _ask(second, stream=False).json()["choices"]


class SharingConformance:
    """What an engine promises besides, that serves several of its models by one instance: `case.twin` is the second."""

    @pytest.fixture
    def twins(self, case: EngineCase) -> tuple[Model, Model]:
        """The good model and its twin, as the catalogue has them."""
        assert case.twin is not None
        return case.engine.describe(case.good), case.engine.describe(case.twin)

    def test_models_that_are_one_in_memory_say_so(self, case: EngineCase, twins: tuple[Model, Model]):
        """Before any load, so that what a second one takes isn't counted twice; others differ."""
        good, twin = twins
        assert good.held_as is not None
        assert good.held_as == twin.held_as
        assert case.engine.describe(case.other).held_as != good.held_as

    def test_a_twin_of_what_is_loaded_is_ready_and_answers_by_its_own_name(self, case: EngineCase):
        """Though the engine lists the first name alone; both hold what they hold, and nothing is told to have ended."""
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

    def test_all_that_one_instance_serves_is_found_loaded(self, case: EngineCase, twins: tuple[Model, Model]):
        """By whichever name it was loaded; each can be taken in and answers."""
        with case.ready():
            found = case.engine.loaded(twins)
            assert {model.id for model in found} == {model.id for model in twins}
            adopted = case.engine.adopt(twins[1], case.exits.append)
            assert adopted is not None
            assert _ask(adopted.wait_ready(lambda _: None, 0), stream=False).json()["choices"]

    def test_stopping_one_stops_its_twin_which_says_so(self, case: EngineCase, twins: tuple[Model, Model]):
        """Stopped by the name that isn't listed: nothing is held any more; the other's end is told once."""
        with case.ready(), case.ready(case.twin) as (second, _):
            second.stop(GRACE)
            wait_until(lambda: bool(case.exits), "the end of the twin to be told")
            assert not case.engine.loaded(twins)
        assert len(case.exits) == 1
        assert case.exits[0].released
        assert twins[1].id in case.exits[0].cause

    def test_what_somebody_else_unloads_ends_all_twins(self, case: EngineCase):
        """Each tells it once."""
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
