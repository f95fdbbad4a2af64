"""A hypothesis state machine over all operations on the heart (`operations.py`), checking its invariants.

A failing run prints its steps; the same steps replay it exactly, since the order of greenlets comes from the seed.
"""

from __future__ import annotations

import logging

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.heart.operations import FAULTS, SLOWNESS, Operations
from tests.heart.rig import MODELS
from tests.heart.simulate import LEAVES_AFTER, SECONDS
from tests.heart.stub import GPU
from tests.heart.wire import ACTS

model_ids = st.sampled_from([m.id for m in MODELS])
EXAMPLES, STEPS = 500, 50


class HeartMachine(RuleBasedStateMachine):
    """Operations, faults, crashes and restarts in any order."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.operations = Operations(seed)

    def teardown(self) -> None:
        if hasattr(self, "operations"):
            self.operations.check_rest()
            self.operations.heart.close()

    @rule(model_id=model_ids, replace=st.sampled_from(["cancel", "cancel", "queue", "refuse"]))
    def switch(self, model_id, replace):
        self.operations.switch(model_id, replace)

    @rule(model_id=model_ids, instead_of=model_ids)
    def replace_model(self, model_id, instead_of):
        self.operations.replace_model(model_id, instead_of)

    @rule(model_id=model_ids)
    def start(self, model_id):
        self.operations.start(model_id)

    @rule(action=st.sampled_from(["stop", "stop", "restart", "remove"]), model_id=model_ids)
    def act(self, action, model_id):
        self.operations.act(action, model_id)

    @rule()
    def cancel(self):
        self.operations.cancel()

    @rule(
        model_id=model_ids,
        act=st.sampled_from(ACTS),
        seconds=st.sampled_from(SECONDS),
        leaves_after=st.sampled_from(LEAVES_AFTER),
    )
    def request(self, model_id, act, seconds, leaves_after):
        self.operations.request(model_id, act, seconds, leaves_after)

    @rule(model_id=model_ids)
    def unload_now(self, model_id):
        self.operations.unload_now(model_id)

    @rule(newest=st.booleans())
    def disconnect(self, newest):
        self.operations.disconnect(newest)

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0, 30.0]))
    def pass_time(self, seconds):
        self.operations.pass_time(seconds)

    @rule(model_id=model_ids)
    def crash(self, model_id):
        self.operations.crash(model_id)

    @rule(model_id=model_ids, load=st.booleans())
    def other_client(self, model_id, load):
        (self.operations.load_by_other if load else self.operations.release_by_other)(model_id)

    @rule(device=st.sampled_from(["host", GPU]), gigabytes=st.sampled_from([0, 0, 2, 5, 9]))
    def take_memory(self, device, gigabytes):
        self.operations.take_memory(device, gigabytes)

    @rule(model_id=model_ids, fault=st.sampled_from(FAULTS), on=st.booleans())
    def set_fault(self, model_id, fault, on):
        self.operations.set_fault(model_id, fault, on)

    @rule(model_id=model_ids, fault=st.sampled_from(SLOWNESS), seconds=st.sampled_from([0.0, 1.5, 60.0]))
    def set_slowness(self, model_id, fault, seconds):
        self.operations.set_fault(model_id, fault, seconds)

    @rule(seconds=st.sampled_from([0.0, 0.5, 5.0]))
    def slow_driver(self, seconds):
        self.operations.slow_driver(seconds)

    @rule(seconds=st.sampled_from([0.0, 0.3, 2.0]))
    def delay_freed_memory(self, seconds):
        self.operations.delay_freed_memory(seconds)

    @rule(dial_seconds=st.sampled_from([0.0, 0.0, 1.0, 8.0]), keep_alive=st.sampled_from([0.5, 5.0, 1e6]))
    def slow_network(self, dial_seconds, keep_alive):
        self.operations.slow_network(dial_seconds, keep_alive)

    @rule(broken=st.booleans())
    def break_store(self, broken):
        self.operations.break_store(broken)

    @rule(full=st.booleans())
    def fill_disk(self, full):
        self.operations.fill_disk(full)

    @rule(model_id=model_ids)
    def remove_file(self, model_id):
        self.operations.remove_file(model_id)

    @rule()
    def restore_files(self):
        self.operations.restore_files()

    @precondition(lambda self: hasattr(self, "operations"))
    @rule(orderly=st.booleans())
    def restart_app(self, orderly):
        (self.operations.restart_app if orderly else self.operations.crash_app)()

    @rule()
    def check_rest(self):
        self.operations.check_rest()

    @invariant()
    def invariants(self):
        if hasattr(self, "operations"):
            self.operations.check()


@pytest.fixture
def quiet():
    """No log lines: the faults here are intended."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.mark.timeout(600)
def test_invariants_hold_after_any_sequence_of_operations(quiet):  # noqa: ARG001
    """20,000 steps check budget, restore, endings, queue, snapshot, requests, preserved models and bounded waits."""
    run_state_machine_as_test(
        HeartMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
