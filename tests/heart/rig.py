"""The heart on stubs: real switcher, procedure, fleet, router and relay; in-memory engines and a virtual clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from services.catalog import Catalog
from services.config import Settings
from services.engines.openai.account import Account
from services.engines.openai.engine import OpenAI
from services.engines.port import HOST_DEVICE, Engine, Model
from services.gateway.relay import Relay
from services.gateway.router import Router
from services.pins import Pins
from services.preferences import PreferenceStore
from services.store.deferred import DeferredLoads, DeferredNotes, DeferredWrites
from services.switching.context import SwitchingContext
from services.switching.events import Board, Snapshot
from services.switching.idle import IdleWatch
from services.switching.jobs import Job, Replace, SwitchError, SwitchOptions
from services.switching.learning import Learned
from services.switching.planner import Planner
from services.switching.switcher import Switcher
from tests.heart.client_request import ClientRequest
from tests.heart.stub import GB, GPU, Machine, StubEngine, StubInstance, StubStore, model
from tests.heart.virtual import VirtualScheduler
from tests.heart.wire import Wire

TIMEOUT = 4000.0
"""Virtual seconds after which a wait counts as endless: longer than all limits in the settings together."""

MODELS = (
    model("small", "solo", 2),
    model("medium", "solo", 4),
    model("large", "solo", 9),
    model("alpha", "shared", 3, held_as="blob-a"),
    model("alpha-too", "shared", 3, held_as="blob-a"),
    model("beta", "shared", 5),
    model("dozer", "sleepy", 6),
    model("snorer", "sleepy", 7),
    model("painter", "solo", 5, kind="image"),
)
"""Ten gigabytes on each device: `large` displaces all others on the host, the two that can sleep each other."""


class Remote(OpenAI):
    """The real engine of remote models, which does no I/O; its models are discovered instead of listed."""

    def __init__(self, models: Iterable[Model]) -> None:
        super().__init__(Account("http://remote.test/v1", "key"), {})
        self._models = tuple(models)

    def discover(self) -> list[Model]:
        return [self.describe(model) for model in self._models]


class Heart:
    """One app at a time on the same machine; `crash` and `restart` replace it by the next."""

    def __init__(
        self, seed: int = 0, models: Iterable[Model] = MODELS, remote: Iterable[Model] = (), **settings: Any
    ) -> None:
        self.scheduler = VirtualScheduler(seed)
        self.machine = Machine(self.scheduler, {GPU: 10 * GB, HOST_DEVICE: 10 * GB})
        self.store = StubStore()
        self.settings = Settings(**settings)
        self.on_stop: Callable[[StubInstance], None] = lambda _: None
        self.requests: list[ClientRequest] = []
        """All requests to the gateway of this app."""
        mine = list(models)

        def engine(name: str, **options: Any) -> StubEngine:
            own = [m for m in mine if m.engine == name]
            return StubEngine(
                name,
                self.scheduler,
                self.machine,
                own,
                on_stop=lambda i: self.on_stop(i),
                on_end=lambda origin, models: self.wire.end(origin, models),
                **options,
            )

        self.engines = {
            "solo": engine("solo"),
            "shared": engine("shared", shared=True),
            "sleepy": engine("sleepy", device=GPU, sleeps=True),
        }
        self.remote = tuple(remote)
        self.state_error: str | None = None
        self._numbers = itertools.count(1)
        self._start()

    def _start(self) -> None:
        self.build()
        self.switcher.start()
        assert self.switcher.wait_first_pass(TIMEOUT)

    def build(self) -> None:
        """Create the app's parts again, without starting them."""
        self.board = Board()
        self.writes = DeferredWrites(self.scheduler)
        engines: dict[str, Engine] = {**self.engines, **({"openai": Remote(self.remote)} if self.remote else {})}
        self.catalog = Catalog((), engines)
        self.catalog.keep_listed(lambda: [v.entry for v in self.board.current.instances.values()])
        learned = Learned(DeferredLoads(self.store, self.writes))
        notes = DeferredNotes(self.store, self.writes)
        self.preferences = PreferenceStore(self.settings.preferences, self.store)
        self.pins = Pins(self.store, scheduler=self.scheduler)
        context = SwitchingContext(
            self.settings, self.preferences, self.pins, self.board, self.catalog, engines, self.scheduler
        )
        self.planner = Planner(context, self.machine, learned)
        self.switcher = Switcher(context, self.planner, learned, notes, self._check_state)
        self.idle = IdleWatch(context, self.switcher)
        self.router = Router(self.settings, self.preferences, self.board, self.catalog, self.switcher, self.scheduler)
        self.wire = Wire(self.scheduler, self.settings.upstream_timeout_seconds, self._listens)
        self.relay = Relay(self.wire.read_timeout, self.wire, lambda: self.board.current.origins)

    def _listens(self, origin: str) -> bool:
        return any(engine.listens(origin) for engine in self.engines.values())

    def _check_state(self) -> None:
        if self.state_error is not None:
            raise SwitchError("state_unwritable", self.state_error)

    def ask(
        self, model_id: str, act: str = "whole", seconds: float = 1.0, leaves_after: float | None = None
    ) -> ClientRequest:
        """Send a request to the gateway; the engine behaves as `act` says (see `wire.py`).

        The client disconnects after `leaves_after` seconds.
        """
        request = ClientRequest(next(self._numbers), model_id, act, seconds, self.scheduler)
        self.requests.append(request)
        router, relay = self.router, self.relay
        self.scheduler.spawn("client", lambda: request.run(router, relay))
        if leaves_after is not None:
            self.wire.call_later(leaves_after, request.disconnect)
        return request

    def restart(self) -> None:
        """Restart the app in an orderly way, which leaves loaded models loaded."""
        self.switcher.close(TIMEOUT, for_good=False)
        self.crash()

    def crash(self) -> None:
        """Kill the app and start it again: a new clock continues at the old one's time."""
        old = self.scheduler
        old.kill()
        self.failures = old.failures
        self.requests.clear()
        self.scheduler = fresh = VirtualScheduler(int(old.now() * 1000) + 1)
        fresh._now = old.now()
        self.machine.scheduler = fresh
        for engine in self.engines.values():
            engine.survive_restart(keep=True)
            engine.scheduler = fresh
        self.machine.catch_up()
        self._start()

    def close(self) -> None:
        self.scheduler.kill()

    # Short forms for tests.

    @property
    def now(self) -> Snapshot:
        return self.board.current

    def model(self, model_id: str) -> Model:
        return next(m for e in self.engines.values() for m in e.listed.values() if m.id == model_id)

    def change(self, model_id: str, **fields: Any) -> None:
        """Change a model's entry."""
        found = self.model(model_id)
        self.engines[found.engine].listed[model_id] = replace(found, **fields)
        self.catalog.refresh()

    def faults(self, model_id: str) -> Any:
        found = self.model(model_id)
        return self.engines[found.engine].faults(found)

    def states(self) -> dict[str, str]:
        return {m: view.state for m, view in self.now.instances.items()}

    def switch(self, model_id: str, *, replace: Replace = "cancel", **options: Any) -> Job:
        return self.switcher.switch(model_id, requested_by="test", replace=replace, options=SwitchOptions(**options))

    def ready(self, model_id: str, **options: Any) -> Job:
        """Switch, and assert that it succeeds."""
        job = self.done(self.switch(model_id, **options))
        assert job.error is None, job.error
        return job

    def done(self, job: Job) -> Job:
        """Wait for a job's end, and fail the test if there is none."""
        assert job.wait_done(TIMEOUT), f"{job} does not end"
        self.scheduler.settle()
        return job

    def until(self, condition: Callable[[], bool], what: str = "") -> None:
        assert self.scheduler.run_until(condition, TIMEOUT), f"waited in vain for {what}"

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with a look for unused models each second, as the app has."""
        for _ in range(int(seconds)):
            self.scheduler.run_until(lambda: False, 1.0)
            self.pins.expire()
            self.idle.check()
        self.scheduler.settle()

    def stage(self, stage: str) -> None:
        """Let time pass until the current switch is at a stage."""
        self.until(lambda: self.now.switch is not None and self.now.switch.stage == stage, stage)
