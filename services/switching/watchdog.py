"""Detects models that have stopped responding while they look healthy, and restarts them.

An engine's health endpoint is no help: a json_schema of 10 KB blocks llama.cpp's generating thread for minutes
(measured), while another thread still answers `/health` with 200. What counts as activity is a byte of any answer or,
without one, a reply of the generating thread to a probe (`Instance.responds`). A long prompt yields no byte for minutes
either, but its thread replies between two batches, so a lack of bytes alone never restarts a model.
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

INTERVAL_SECONDS = 1.0
PROBE_SECONDS = 10.0
"""Inactivity after which an engine is probed; a third of the limit if that is less."""
WARN_SECONDS = 20.0
"""Inactivity, probes included, after which people are warned; two thirds of the limit if that is less."""
BACKOFF_SECONDS = (0.0, 30.0, 120.0)
"""Delays before the first, second and third restart within RESTART_WINDOW_SECONDS. There is no fourth restart."""
RESTART_WINDOW_SECONDS = 900.0

OnInstanceExit = Callable[[Instance, Exit], None]


@dataclass(eq=False)
class _Activity:
    """Activity of one instance: the count last seen, and since when it has not grown (monotonic seconds)."""

    count: int
    since: float
    probing: bool = False
    """Whether a probe is under way."""


class Watchdog:
    """Watches every running instance, with at most one probe each under way, in a greenlet of its own.

    An instance inactive for `limit` seconds (0: no limit) is stopped: `on_exit` gets the reason, its requests are
    broken off and not retried, and after a backoff `load` is called with the model's id and whether it was active.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        mailbox: Mailbox,
        fleet: Fleet,
        limit: float,
        on_exit: OnInstanceExit,
        load: Callable[[str, bool], object],
    ) -> None:
        self._scheduler = scheduler
        self._mailbox = mailbox
        self._fleet = fleet
        self._limit = limit
        self._probe_after = min(PROBE_SECONDS, limit / 3)
        self._warn_after = min(WARN_SECONDS, 2 * limit / 3)
        self._on_exit = on_exit
        self._load = load
        self._activities: dict[Instance, _Activity] = {}
        self._restarts: defaultdict[str, list[float]] = defaultdict(list)
        self._changed = scheduler.condition()
        self._stopped = False

    def start(self) -> None:
        if self._limit:
            self._scheduler.spawn("watchdog", self._run)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._stopped:
            try:
                self.check()
            except MailboxClosed:
                return
            self._pause(INTERVAL_SECONDS)

    def check(self) -> None:
        """Compare every running instance's activity with the last check; probe or end the inactive ones."""
        running = [m for m in self._mailbox.call(self._fleet.members) if m.state == "running" and m.shares is None]
        before, self._activities = self._activities, {}
        for member in running:
            activity = before.get(member.instance) or _Activity(member.traffic.activity_count, self._scheduler.now())
            self._activities[member.instance] = activity
            self._check(member, activity)

    def _check(self, member: Member, activity: _Activity) -> None:
        now, traffic = self._scheduler.now(), member.traffic
        if traffic.activity_count != activity.count or not (traffic.in_flight or traffic.unanswered):
            activity.count, activity.since = traffic.activity_count, now
        silent = now - activity.since
        if member.unresponsive != (silent >= self._warn_after):
            self._mailbox.post(self._fleet.set_unresponsive, member, not member.unresponsive)
        if silent >= self._limit:
            activity.since = now  # the next check must not end it again while it is being stopped
            self._scheduler.spawn(f"end-{member.model.id}", lambda: self._end(member, silent))
        elif silent >= self._probe_after and not activity.probing:
            activity.probing = True
            self._scheduler.spawn(f"ask-{member.model.id}", lambda: self._probe(member, activity, self._limit - silent))

    def _probe(self, member: Member, activity: _Activity, timeout: float) -> None:
        try:
            if member.instance.responds(timeout) is not False:
                member.traffic.note_activity()
        except Exception as error:
            log.warning("a model can't be probed", model=member.model.id, error=str(error))
        finally:
            activity.probing = False

    def _end(self, member: Member, silent: float) -> None:
        """Stop an unresponsive instance, and load its model again after a backoff."""
        model_id, waiting = member.model.id, member.traffic.in_flight
        was_active = self._fleet.active == model_id
        what = {0: "", 1: ", with one request under way"}.get(waiting, f", with {waiting} requests under way")
        self._on_exit(member.instance, Exit(f"It stopped responding for {silent:.0f} s{what}, and was ended"))
        try:
            member.instance.stop(0.0)
        except Exception as error:
            log.warning("an unresponsive model can't be stopped", model=model_id, error=str(error))
            return
        delay = self._delay(model_id)
        if delay is None:
            log.warning("a model stopped responding too often; it stays unloaded", model=model_id)
            return
        self._pause(delay)
        if not self._stopped:
            self._load(model_id, was_active)

    def _delay(self, model_id: str) -> float | None:
        """Return the seconds until the next restart of a model; None if it was restarted too often."""
        now = self._scheduler.now()
        times = self._restarts[model_id]
        times[:] = [at for at in times if now - at < RESTART_WINDOW_SECONDS]
        if len(times) == len(BACKOFF_SECONDS):
            return None
        times.append(now)
        return BACKOFF_SECONDS[len(times) - 1]

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)
