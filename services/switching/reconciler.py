"""Keeps the fleet consistent with the engines: adopts what they have loaded, and measures what is loaded.

Engines may be shared with other clients and outlive the app, so what they report is polled. Each engine is polled in a
greenlet of its own, so that one that hangs delays no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from services.engines.port import Endpoint, Engine, EngineError, Exit, Instance, Model
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet
from services.switching.mailbox import Mailbox, MailboxClosed
from services.switching.member import measure
from services.switching.planner import Planner

log = structlog.get_logger(__name__)

INTERVAL_SECONDS = 1.0
FIRST_PASS_SECONDS = 10.0
"""How long the start waits for the first pass over the engines; later answers are taken in when they come."""
ADOPT_SECONDS = 2.0
"""How long an instance to adopt may take to say that it is ready."""

OnInstanceExit = Callable[[Instance, Exit], None]


class Reconciler:
    """Polls every engine each INTERVAL_SECONDS. `on_exit` is called when an adopted instance ends unasked."""

    def __init__(
        self, context: SwitchingContext, mailbox: Mailbox, fleet: Fleet, planner: Planner, on_exit: OnInstanceExit
    ) -> None:
        self._scheduler = context.scheduler
        self._mailbox = mailbox
        self._fleet = fleet
        self._board = context.board
        self._catalog = context.catalog
        self._engines = context.engines
        self._planner = planner
        self._on_exit = on_exit
        self._changed = context.scheduler.condition()
        self._stopped = False
        self._pending = set(context.engines)
        self._adopting: set[str] = set()
        self._not_responding: set[str] = set()
        """Models that are loaded but don't answer yet, for which a notice was published."""
        self._deadline = float("inf")

    def start(self) -> None:
        self._deadline = self._scheduler.now() + FIRST_PASS_SECONDS
        for engine in self._engines.values():
            self._scheduler.spawn(f"look-at-{engine.name}", lambda engine=engine: self._reconcile_loop(engine))  # type: ignore[misc]
        self._scheduler.spawn("measure", self._measure_loop)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def first_pass_done(self) -> bool:
        """Whether every engine was polled once, or FIRST_PASS_SECONDS have passed."""
        return not self._pending or self._scheduler.now() >= self._deadline

    def wait_first_pass(self, timeout: float) -> bool:
        """Wait until every engine was polled once, at most `timeout` seconds; return `first_pass_done`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._stopped, timeout)
        return self.first_pass_done

    def reconcile_model(self, model: Model) -> None:
        """Adopt a model now if its engine has it loaded: another client may have loaded it meanwhile."""
        try:
            self._reconcile(self._engines[model.engine], [model])
        except MailboxClosed:
            raise
        except Exception as error:
            log.warning("an engine can't be polled", engine=model.engine, error=str(error))

    def measure(self) -> None:
        """Take a fresh measurement of everything that is loaded."""
        for member in self._mailbox.call(self._fleet.members):
            if member.is_loaded:
                self._mailbox.call(self._fleet.update_measurement, member, measure(member.instance))

    def _reconcile_loop(self, engine: Engine) -> None:
        while not self._stopped:
            try:
                self._reconcile(engine, [m for m in self._catalog.models.values() if m.engine == engine.name])
            except MailboxClosed:
                return
            except Exception:
                log.exception("polling an engine failed", engine=engine.name)
            with self._changed:
                self._pending.discard(engine.name)
                self._changed.notify_all()
            self._pause()

    def _measure_loop(self) -> None:
        while not self._stopped:
            self._pause()
            try:
                self.measure()
            except MailboxClosed:
                return
            except Exception:
                log.exception("measuring loaded models failed")

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, INTERVAL_SECONDS)

    def _reconcile(self, engine: Engine, models: list[Model]) -> None:
        for model in engine.loaded(models):
            with self._exclusively(model.id):
                if model.id not in self._board.current.instances and not self._stopped:
                    self._adopt(engine, model)

    @contextmanager
    def _exclusively(self, model_id: str) -> Iterator[None]:
        """Keep others from adopting the same model meanwhile: a job and the periodic pass may try at once."""
        with self._changed:
            self._changed.wait_for(lambda: model_id not in self._adopting)
            self._adopting.add(model_id)
        try:
            yield
        finally:
            with self._changed:
                self._adopting.discard(model_id)
                self._changed.notify_all()

    def _adopt(self, engine: Engine, model: Model) -> None:
        instance: Instance | None = None

        def ended(exit: Exit) -> None:
            if instance is not None:
                self._on_exit(instance, exit)

        try:
            instance = engine.adopt(model, ended)
            if instance is None:
                if model.id in self._not_responding:
                    self._not_responding.discard(model.id)
                    self._mailbox.post(self._fleet.clear_failure, model.id)
                return
            endpoint: Endpoint | None = None
            if not instance.asleep:
                endpoint = instance.wait_ready(lambda _: None, ADOPT_SECONDS)
        except EngineError as error:
            if model.id not in self._not_responding:
                self._not_responding.add(model.id)
                log.info("a loaded model does not answer yet", model=model.id, reason=str(error))
                self._mailbox.post(self._fleet.set_notice, model.id, f"It is loaded, but does not answer yet: {error}")
            return
        self._not_responding.discard(model.id)
        device = self._planner.need(model).device
        if self._mailbox.call(self._fleet.adopt, model, engine, instance, device, endpoint, measure(instance)):
            log.info("adopted a loaded model", model=model.id, engine=engine.name, asleep=endpoint is None)
