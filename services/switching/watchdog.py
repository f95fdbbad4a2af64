"""Finds models that have stopped responding while they look healthy, and restarts them.

An engine's health endpoint is no help: a json_schema of 10 KB holds the part of llama.cpp that generates for minutes
(measured), while another of its threads goes on answering `/health` with 200. What counts is a sign of life: a byte of
any answer, or when none comes, the word of the part that generates (`Instance.responds`). A long prompt gives no byte
for minutes either, but lets that part answer between its batches; so silence alone never restarts a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.engines.port import Exit, Instance
from services.scheduling import Scheduler
from services.switching.fleet import Fleet
from services.switching.mailbox import Mailbox, MailboxClosed
from services.switching.member import Member

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
QUIET_SECONDS = 10.0
"""Silence after which an engine is asked for a sign of life; a third of the limit, if that is less."""
WARN_SECONDS = 20.0
"""Silence, of the engine as well, after which people are told; two thirds of the limit, if that is less."""
BACKOFF_SECONDS = (0.0, 30.0, 120.0)
"""How long the first, second and third restart within FORGET_SECONDS wait. There is no fourth."""
FORGET_SECONDS = 900.0

OnExit = Callable[[Instance, Exit], None]


@dataclass(eq=False)
class Pulse:
    """What was last seen of one instance: how many signs of life, and since when there has been no other."""

    signs: int
    since: float
    asked: bool = False
    """Whether its engine is being asked at this moment."""


class Watchdog:
    """Watches every running instance. Each has at most one question under way, in a greenlet of its own.

    One that was silent for `limit` seconds (0: no limit) is ended: `on_exit` is told why, its requests break off, none
    of them is sent again, and `load` is called for its model later, with whether it was the active one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        mailbox: Mailbox,
        fleet: Fleet,
        limit: float,
        on_exit: OnExit,
        load: Callable[[str, bool], object],
    ) -> None:
        self._scheduler = scheduler
        self._mailbox = mailbox
        self._fleet = fleet
        self._limit = limit
        self._quiet = min(QUIET_SECONDS, limit / 3)
        self._warn = min(WARN_SECONDS, 2 * limit / 3)
        self._on_exit = on_exit
        self._load = load
        self._pulses: dict[Instance, Pulse] = {}
        self._restarts: defaultdict[str, list[float]] = defaultdict(list)
        self._changed = scheduler.condition()
        self._stopped = False

    def start(self) -> None:
        if self._limit:
            self._scheduler.spawn("watchdog", self._keep_looking)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _keep_looking(self) -> None:
        while not self._stopped:
            try:
                self.look()
            except MailboxClosed:
                return
            self._pause(LOOK_SECONDS)

    def look(self) -> None:
        """See who has given a sign of life since the last look, and ask the others."""
        running = [m for m in self._mailbox.call(self._fleet.members) if m.state == "running" and m.shares is None]
        before, self._pulses = self._pulses, {}
        for member in running:
            pulse = before.get(member.instance) or Pulse(member.traffic.signs, self._scheduler.now())
            self._pulses[member.instance] = pulse
            self._check(member, pulse)

    def _check(self, member: Member, pulse: Pulse) -> None:
        now, traffic = self._scheduler.now(), member.traffic
        if traffic.signs != pulse.signs or not (traffic.in_flight or traffic.unanswered):
            pulse.signs, pulse.since = traffic.signs, now
        silent = now - pulse.since
        if member.silent != (silent >= self._warn):
            self._mailbox.post(self._fleet.silent, member, not member.silent)
        if silent >= self._limit:
            pulse.since = now  # ended once, however long its end takes
            self._scheduler.spawn(f"end-{member.model.id}", lambda: self._end(member, silent))
        elif silent >= self._quiet and not pulse.asked:
            pulse.asked = True
            self._scheduler.spawn(f"ask-{member.model.id}", lambda: self._ask(member, pulse, self._limit - silent))

    def _ask(self, member: Member, pulse: Pulse, timeout: float) -> None:
        try:
            if member.instance.responds(timeout) is not False:
                member.traffic.heard()
        except Exception as error:
            log.warning("a model can't be asked for a sign of life", model=member.model.id, error=str(error))
        finally:
            pulse.asked = False

    def _end(self, member: Member, silent: float) -> None:
        """End an instance that does not respond, and load its model again, later each time."""
        model_id, waiting = member.model.id, member.traffic.in_flight
        was_active = self._fleet.active == model_id
        what = {0: "", 1: ", with one request under way"}.get(waiting, f", with {waiting} requests under way")
        self._on_exit(member.instance, Exit(f"It stopped responding for {silent:.0f} s{what}, and was ended"))
        try:
            member.instance.stop(0.0)
        except Exception as error:
            log.warning("a model that stopped responding can't be ended", model=model_id, error=str(error))
            return
        delay = self._delay(model_id)
        if delay is None:
            log.warning("a model stops responding again and again; it stays unloaded", model=model_id)
            return
        self._pause(delay)
        if not self._stopped:
            self._load(model_id, was_active)

    def _delay(self, model_id: str) -> float | None:
        """Seconds until the next restart of a model; None when it had enough of them."""
        now = self._scheduler.now()
        times = self._restarts[model_id]
        times[:] = [at for at in times if now - at < FORGET_SECONDS]
        if len(times) == len(BACKOFF_SECONDS):
            return None
        times.append(now)
        return BACKOFF_SECONDS[len(times) - 1]

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)
