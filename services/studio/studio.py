"""The Studio's runs: started, followed, cancelled, kept and deleted. A run goes on when its page is closed.

One run at a time: two would share the same providers, and local ones would be switched to and fro between them.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import structlog

from services.providers.ports import JobProviders
from services.scheduling import Scheduler, ThreadScheduler
from services.store.errors import StoreError
from services.store.records import Place, StudioCandidate, StudioRun, new_id
from services.store.repository import StudioRepository
from services.studio.live_run import LiveRun, RunEvent, RunView, replayed
from services.studio.pictures import Pictures
from services.studio.ranking import with_ranks
from services.studio.request import LARGEST_SEED, InvalidRequest, Origin, RunRequest, Wording, check_shape, clean_prompt

if TYPE_CHECKING:
    from services.studio.search import Search

log = structlog.get_logger(__name__)

FINISHED_IN_MEMORY = 4
"""Runs that are over and whose whole log of events is still there."""
CLOSE_SECONDS = 5.0
CANCEL_SECONDS = 5.0
"""How long a cancel waits for the calls upstream to end."""
_LIVE, _KEPT = "live", "kept"


class StudioError(Exception):
    """A request about runs was refused. `code` is an error code of the contract; the text is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RunNotFound(Exception):
    """The run does not exist."""

    def __init__(self) -> None:
        super().__init__("This run does not exist, or was deleted.")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks for: the values of a RunRequest, not checked yet.

    `origin` is the run and the number of the candidate to go on from. Without a seed one is drawn.
    """

    prompt: str
    beam_width: int
    iterations: int
    candidates: int
    seed: int | None = None
    origin: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """A run in the list, and its best candidate, None without a scored one."""

    run: StudioRun
    best: StudioCandidate | None


class _Writes(Protocol):
    def put(self, write: Callable[[], object]) -> None: ...


class _Running:
    """A run in memory: its job, and what of it is not in the database yet."""

    def __init__(self, run: StudioRun, repository: StudioRepository, writes: _Writes, scheduler: Scheduler) -> None:
        self._repository = repository
        self._writes = writes
        self._lock = threading.Lock()
        self._changed: set[int] = set()
        self._queued = False
        self._deleted = False
        self.live = LiveRun(run, scheduler, self._save_later)
        self.search: Search | None = None

    @property
    def unsaved(self) -> bool:
        return self._queued

    def save(self) -> None:
        """Queue the run itself to be saved."""
        self._save_later(set())

    def delete(self) -> set[str] | None:
        """Delete the run from the database for good; return what `StudioRepository.delete` does."""
        with self._lock:
            view = self.live.view
            if self._queued:  # the database is to tell which of its pictures no other run has
                self._repository.save(view.run, view.candidates)
            orphans = self._repository.delete(view.run.id)
            self._deleted = True
            return orphans

    def _save_later(self, changed: set[int]) -> None:
        self._changed |= changed
        if not self._queued:
            self._queued = True
            self._writes.put(self._write)

    def _write(self) -> None:
        """Save what has changed; a failing database calls this again later."""
        with self._lock:
            if self._deleted:
                return
            self._queued = False
            changed, self._changed = self._changed, set()
            view = self.live.view
            try:
                self._repository.save(view.run, [c for c in view.candidates if c.number in changed])
            except BaseException:
                self._queued = True
                self._changed |= changed
                raise


class Studio:
    """All runs: the one under way, and the kept ones.

    `providers` returns those of the next run as they are chosen now; it raises ProviderError if one can't be used.
    """

    def __init__(
        self,
        repository: StudioRepository,
        pictures: Pictures,
        providers: Callable[[], JobProviders],
        writes: _Writes,
        *,
        at_once: int,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.pictures = pictures
        self._repository = repository
        self._providers = providers
        self._writes = writes
        self._at_once = at_once
        self._scheduler = scheduler or ThreadScheduler()
        self._lock = threading.Lock()
        self._runs: dict[str, _Running] = {}
        self._starting = False
        self._closed = False
        try:
            repository.mark_interrupted(self._scheduler.time())
        except StoreError as error:  # harmless: a run without a job is shown as interrupted (`_kept`)
            log.warning("interrupted runs can't be marked", error=str(error))

    @property
    def under_way(self) -> RunView | None:
        """The run under way, if any."""
        return next((r.live.view for r in list(self._runs.values()) if not r.live.view.run.final), None)

    def start(self, asked: Asked) -> RunView:
        """Start a run with the providers chosen now; return it at once.

        Raises InvalidRequest, RunNotFound (of the origin), StudioError `run_in_progress` and `stopping`, and what
        `providers` raises.
        """
        request = self._checked(asked)
        with self._lock:
            self._check_free()
            self._starting = True
        try:
            running = self._begin(request, self._providers())
        finally:
            self._starting = False
        return running.live.view

    def check(self, asked: Asked) -> RunRequest:
        """Return the request that would be started, to tell what it costs. Raises InvalidRequest and RunNotFound."""
        return self._checked(asked)

    def get(self, run_id: str) -> RunView:
        """Return a run in its current state. Raises RunNotFound."""
        running = self._runs.get(run_id)
        return running.live.view if running is not None else self._kept(run_id)

    def listed(self, limit: int, older_than: Place | None = None) -> list[Listed]:
        """Return runs, the one begun last first, at most `limit`, from a place on (time of the beginning, id)."""
        stored = {run.id: run for run in self._repository.newest_first(limit, older_than)}
        ranked = self._repository.best(list(stored))
        live = (r.live.view.run for r in list(self._runs.values()))
        stored |= {run.id: run for run in live if older_than is None or _key(run) > (-older_than[0], older_than[1])}
        runs = sorted(stored.values(), key=_key)[:limit]
        return [Listed(self._shown(run), self._best(run.id) or ranked.get(run.id)) for run in runs]

    def follow(self, run_id: str, last_event: str = "") -> Iterator[tuple[str, RunEvent] | None]:
        """Yield the ids and events of a run after the one with the id `last_event`, all for an unknown one.

        Yields None after a while without an event. Raises RunNotFound at once, not when iterated.
        """
        running = self._runs.get(run_id)
        edition = _LIVE if running is not None else _KEPT
        of, _, number = last_event.partition("-")
        after = int(number) if of == edition and number.isdecimal() and len(number) < 10 else 0
        if running is not None:
            events: Iterator[RunEvent | None] = running.live.follow(after)
        else:
            events = (event for event in replayed(self._kept(run_id)) if event.number > after)
        return (None if event is None else (f"{edition}-{event.number}", event) for event in events)

    def cancel(self, run_id: str) -> RunView:
        """Cancel a run and wait for its end, some seconds at most; a run that is over stays as it is.

        Raises RunNotFound.
        """
        running = self._runs.get(run_id)
        if running is None or running.search is None:
            return self.get(run_id)
        running.search.cancel()
        running.live.wait_final(CANCEL_SECONDS)
        return running.live.view

    def delete(self, run_id: str) -> None:
        """Delete a run that is over, and its pictures that no other run has.

        Raises RunNotFound, and StudioError `not_possible` for one under way.
        """
        running = self._runs.get(run_id)
        if running is not None and not running.live.view.run.final:
            raise StudioError("not_possible", "This run is under way. Cancel it first.")
        orphans = self._repository.delete(run_id) if running is None else running.delete()
        self._runs.pop(run_id, None)
        if orphans is None and running is None:
            raise RunNotFound
        for picture in orphans or ():
            self.pictures.remove(picture)

    def close(self) -> None:
        """Cancel the run under way, which counts as interrupted, and wait a few seconds for its end."""
        with self._lock:
            self._closed = True
        for running in list(self._runs.values()):
            if running.search is not None and not running.live.view.run.final:
                running.search.cancel("interrupted")
                running.live.wait_final(CLOSE_SECONDS)

    def _checked(self, asked: Asked) -> RunRequest:
        prompt = clean_prompt(asked.prompt)
        seed = secrets.randbelow(LARGEST_SEED + 1) if asked.seed is None else asked.seed
        check_shape(asked.beam_width, asked.iterations, asked.candidates, seed)
        origin = None if asked.origin is None else self._origin(*asked.origin)
        return RunRequest(prompt, asked.beam_width, asked.iterations, asked.candidates, seed, origin)

    def _origin(self, run_id: str, number: int) -> Origin:
        candidate = self.get(run_id).candidate(number)
        if candidate is None:
            raise InvalidRequest("continue_from", f"That run has no candidate {number}.")
        from services.studio.search import told  # on demand: few start a run

        said = told(candidate) if candidate.state == "scored" else ""
        return Origin(run_id, number, Wording(candidate.what, candidate.how), said)

    def _check_free(self) -> None:
        """Raise StudioError if no run can be started now."""
        self._check_open()
        if self._starting or self.under_way is not None:
            raise StudioError(
                "run_in_progress",
                "Another run is under way, and the Studio makes one at a time. Wait for its end, or cancel it.",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise StudioError("stopping", "Switchyard is stopping. Start the run once it is running again.")

    def _begin(self, request: RunRequest, providers: JobProviders) -> _Running:
        run = StudioRun(
            id=new_id(),
            prompt=request.prompt,
            beam_width=request.beam_width,
            iterations=request.iterations,
            candidates=request.candidates,
            seed=request.seed,
            state="running",
            providers={str(capability): served for capability, served in providers.names().items()},
            created_at=self._scheduler.time(),
            origin_run=request.origin.run if request.origin else None,
            origin_number=request.origin.number if request.origin else None,
        )
        from services.studio.search import Search  # on demand: few start a run

        running = _Running(run, self._repository, self._writes, self._scheduler)
        search = Search(running.live, request, providers, self.pictures, self._scheduler, self._at_once)
        running.search = search
        with self._lock:
            self._check_open()  # again: the providers were checked meanwhile, and `close` ends what is listed here
            self._forget_old()
            self._runs[run.id] = running
        running.save()
        self._scheduler.spawn(f"studio-{run.id[:8]}", search.run)
        return running

    def _forget_old(self) -> None:
        """Drop saved runs that are over from memory, except the latest."""
        over = [run_id for run_id, r in self._runs.items() if r.live.view.run.final and not r.unsaved]
        for run_id in over[: max(0, len(over) - FINISHED_IN_MEMORY)]:
            del self._runs[run_id]

    def _kept(self, run_id: str) -> RunView:
        """Return a run from the database. Raises RunNotFound."""
        found = self._repository.get(run_id)
        if found is None:
            raise RunNotFound
        run, candidates = found
        return RunView(self._shown(run), tuple(with_ranks(candidates)))

    def _shown(self, run: StudioRun) -> StudioRun:
        """Return a run as it is shown: one in state `running` without a job, as from a backup, was interrupted."""
        if run.final or run.id in self._runs:
            return run
        return replace(run, state="interrupted", finished_at=run.finished_at or run.created_at)

    def _best(self, run_id: str) -> StudioCandidate | None:
        running = self._runs.get(run_id)
        ranking = running.live.view.ranking if running is not None else ()
        return ranking[0] if ranking else None


def _key(run: StudioRun) -> tuple[float, str]:
    """Return the sort key of the list of runs: the one begun last first."""
    return -run.created_at, run.id
