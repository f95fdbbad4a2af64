"""What the Studio's pages say about a run, as text. Pure: a function of the run and the time."""

from __future__ import annotations

from dataclasses import dataclass

from blueprints.filters import duration, span
from blueprints.provider_looks import CAPABILITIES, NAMES
from services.providers.ports import Capability, Choice
from services.store.records import RunState, StudioRun
from services.studio.live_run import Activity, RunView
from services.studio.request import TRIES_PER_LIST, TRIES_PER_SCORE, Calls, Phase, RunRequest, most_calls
from services.text import join_names

_WORK: dict[Phase, str] = {
    "texts": "Writing candidates",
    "images": "Drawing pictures",
    "scores": "Scoring pictures",
}
_UNITS: dict[Phase, tuple[str, str]] = {
    "texts": ("list", "lists"),
    "images": ("picture", "pictures"),
    "scores": ("picture", "pictures"),
}
_STATES: dict[RunState, tuple[str, str]] = {
    "running": ("Running", "loading"),
    "complete": ("Complete", "running"),
    "failed": ("Failed", "failed"),
    "cancelled": ("Cancelled", "queued"),
    "interrupted": ("Interrupted", "queued"),
}

_TITLES: dict[str, str] = {str(capability): title for capability, title in CAPABILITIES.items()}
"""The names of capabilities, by what a stored run calls them."""


@dataclass(frozen=True, slots=True)
class RunWords:
    """A run in words, at the time `now` (Unix seconds)."""

    view: RunView
    now: float

    @property
    def run(self) -> StudioRun:
        return self.view.run

    @property
    def state(self) -> str:
        return "Cancelling" if self.view.cancelling else _STATES[self.run.state][0]

    @property
    def drawn(self) -> str:
        """The mark and colour of the state."""
        return "unloading" if self.view.cancelling else _STATES[self.run.state][1]

    @property
    def headline(self) -> str:
        """What happens now, or how it ended."""
        if self.view.cancelling:
            return "Cancelling: the calls under way are being ended."
        activity = self.view.activity
        if activity is not None:
            return f"Iteration {activity.iteration} of {self.run.iterations}: {self._doing(activity)}"
        return self._ended if self.run.final else "Starting"

    @property
    def progress(self) -> str | None:
        """How much of the current phase is done; None while there is nothing to count."""
        activity = self.view.activity
        if activity is None or activity.making_ready or self.view.cancelling:
            return None
        one, many = _UNITS[activity.phase]
        return f"{activity.done} of {activity.total} {one if activity.total == 1 else many}"

    @property
    def waiting(self) -> str | None:
        """Why nothing happens for a while, and until when."""
        wait = self.view.wait
        if wait is None or self.view.cancelling:
            return None
        left = max(0.0, wait.until - self.now)
        return f"{wait.provider} asked to wait {duration(left)}: {wait.message}"

    @property
    def switching(self) -> str | None:
        """What loading the providers' models took; None if nothing."""
        spent = {_TITLES.get(c, c): seconds for c, seconds in self.run.switching_seconds.items() if seconds >= 0.05}
        if not spent:
            return None
        parts = join_names([f"{name.lower()} {duration(seconds)}" for name, seconds in spent.items()])
        return f"{duration(sum(spent.values()))} ({parts})"

    @property
    def calls(self) -> str:
        """The calls made, of how many at most."""
        return f"{sum(self.run.calls.values())} of at most {most_calls(request_of(self.run)).total}"

    @property
    def took(self) -> str:
        """How long it has been running, or took."""
        return duration((self.run.finished_at or self.now) - self.run.created_at)

    @property
    def announcement(self) -> list[str]:
        """Lines for screen readers, each read once: phases, waits, notes and the end; no figures that move."""
        lines = [f"{self.headline}." if not self.headline.endswith(".") else self.headline, *self.run.notes]
        if self.view.wait is not None:
            lines.append(f"{self.view.wait.provider} has to be waited for. {self.view.wait.message}")
        return [" ".join(line.split()) for line in lines]

    def _doing(self, activity: Activity) -> str:
        served = (
            activity.provider
            if activity.model in (None, activity.provider)
            else f"{activity.provider} ({activity.model})"
        )
        work = _WORK[activity.phase].lower()
        return f"getting {served} ready for {work}" if activity.making_ready else f"{work} with {served}"

    @property
    def _ended(self) -> str:
        ranked = len(self.view.ranking)
        made = (
            "no picture was ranked"
            if not ranked
            else "1 picture is ranked"
            if ranked == 1
            else f"{ranked} pictures are ranked"
        )
        return {
            "complete": f"Complete in {span(self._seconds)}: {made}.",
            "failed": f"Failed: {made}.",
            "cancelled": f"Cancelled: {made}.",
            "interrupted": f"Switchyard was stopped or restarted during this run: {made}.",
        }[self.run.state]

    @property
    def _seconds(self) -> float:
        return (self.run.finished_at or self.now) - self.run.created_at


def request_of(run: StudioRun) -> RunRequest:
    """Return the request that a run was started with, as far as its number of calls depends on it."""
    return RunRequest(run.prompt, run.beam_width, run.iterations, run.candidates, run.seed)


def calls_in_words(calls: Calls) -> str:
    """Say how many calls a run makes at most, and how many when no answer has to be asked for again."""
    usual = calls.texts // TRIES_PER_LIST + calls.images + calls.scores // TRIES_PER_SCORE
    parts = f"{calls.texts} for text, {calls.images} for pictures, {calls.scores} for scores"
    return f"This run makes at most {calls.total} calls: {parts}. {usual} if every list and score can be read at once."


def served_in_words(choice: Choice) -> str:
    """Say who serves each capability."""
    named: list[tuple[Capability, str]] = [("llm", choice.llm), ("image", choice.image), ("vision", choice.vision)]
    return " · ".join(f"{CAPABILITIES[c]}: {NAMES[c].get(provider, provider)}" for c, provider in named)
