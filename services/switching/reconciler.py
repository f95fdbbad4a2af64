"""Keeps the fleet true to the engines: takes in what they have loaded, and measures what is loaded.

Engines may be shared with others, and outlive the app: what runs there is their word, asked for again and again. Each
engine is looked at in a greenlet of its own, so that one that hangs delays no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from services.engines.port import Endpoint, Engine, EngineError, Exit, Instance, Model
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet
from services.switching.mailbox import Mailbox, MailboxClosed
from services.switching.member import read
from services.switching.planner import Planner

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
FIRST_LOOK_SECONDS = 10.0
"""How long the app waits for the first look at its engines; what answers later is taken in then."""
ADOPT_SECONDS = 2.0

OnExit = Callable[[Instance, Exit], None]


class Reconciler:
    """Looks at every engine, each second. `on_exit` is told when an adopted instance ends by itself."""

    def __init__(
        self, context: SwitchingContext, mailbox: Mailbox, fleet: Fleet, planner: Planner, on_exit: OnExit
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
        self._unseen = set(context.engines)
        self._adopting: set[str] = set()
        self._silent: set[str] = set()
        """What is loaded but doesn't answer yet, which has been said."""
        self._give_up_at = float("inf")

    def start(self) -> None:
        self._give_up_at = self._scheduler.now() + FIRST_LOOK_SECONDS
        for engine in self._engines.values():
            self._scheduler.spawn(f"look-at-{engine.name}", lambda engine=engine: self._keep_looking(engine))  # type: ignore[misc]
        self._scheduler.spawn("measure", self._keep_measuring)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def looked(self) -> bool:
        """Whether the first look at every engine is over, or was waited for long enough."""
        return not self._unseen or self._scheduler.now() >= self._give_up_at

    def wait_looked(self, timeout: float) -> bool:
        """Wait for the first look at every engine, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unseen or self._stopped, timeout)
        return self.looked

    def look_for(self, model: Model) -> None:
        """Take in one model now if its engine has it loaded: another client may have had that done meanwhile."""
        try:
            self._look(self._engines[model.engine], [model])
        except MailboxClosed:
            raise
        except Exception as error:
            log.warning("an engine can't be looked at", engine=model.engine, error=str(error))

    def measure(self) -> None:
        """Take a fresh reading of everything that is loaded."""
        for member in self._mailbox.call(self._fleet.members):
            if member.held:
                self._mailbox.call(self._fleet.measured, member, read(member.instance))

    def _keep_looking(self, engine: Engine) -> None:
        while not self._stopped:
            try:
                self._look(engine, [m for m in self._catalog.models.values() if m.engine == engine.name])
            except MailboxClosed:
                return
            except Exception:
                log.exception("a look at an engine failed", engine=engine.name)
            with self._changed:
                self._unseen.discard(engine.name)
                self._changed.notify_all()
            self._rest()

    def _keep_measuring(self) -> None:
        while not self._stopped:
            self._rest()
            try:
                self.measure()
            except MailboxClosed:
                return
            except Exception:
                log.exception("what is loaded can't be measured")

    def _rest(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, LOOK_SECONDS)

    def _look(self, engine: Engine, models: list[Model]) -> None:
        for model in engine.loaded(models):
            with self._alone(model.id):
                if model.id not in self._board.current.instances and not self._stopped:
                    self._adopt(engine, model)

    @contextmanager
    def _alone(self, model_id: str) -> Iterator[None]:
        """Nobody else adopts the same model meanwhile: a job and the regular look may want to at once."""
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
                if model.id in self._silent:
                    self._silent.discard(model.id)
                    self._mailbox.post(self._fleet.forgive, model.id)
                return
            endpoint: Endpoint | None = None
            if not instance.asleep:
                endpoint = instance.wait_ready(lambda _: None, ADOPT_SECONDS)
        except EngineError as error:
            if model.id not in self._silent:
                self._silent.add(model.id)
                log.info("a model that is loaded does not answer yet", model=model.id, reason=str(error))
                self._mailbox.post(self._fleet.note, model.id, f"It is loaded, but does not answer yet: {error}")
            return
        self._silent.discard(model.id)
        device = self._planner.need(model).device
        if self._mailbox.call(self._fleet.adopt, model, engine, instance, device, endpoint, read(instance)):
            log.info("found a model loaded", model=model.id, engine=engine.name, asleep=endpoint is None)
