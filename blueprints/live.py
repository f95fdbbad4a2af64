"""What every page says about models, switches and downloads, as text. Pure: a function of the status and the time.

All pages render the same `Live`, so that they can't contradict each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from blueprints.filters import about, duration
from services.downloads.download import Download
from services.engines.supervisor import ServiceStatus
from services.engines.supervisor import State as ServiceState
from services.providers.docker_service import UNUSED, DockerStatus
from services.status import CACHE_SECONDS, ModelState, ModelStatus, Status
from services.switching.events import Loss, SwitchStage, SwitchView
from services.text import running_again

Tone = Literal["moving", "ready", "cancelled", "failed", "lost"]

GOOD_NEWS_SECONDS = 4.0
"""How long the banner shows a switch that succeeded or was cancelled."""
LONG_SECONDS = 120.0
"""Remaining time from which the page says that leaving it is fine."""
ASK_FROM_PERCENT = 50
"""Progress from which a running switch is not abandoned without a confirmation."""
ENDED_SHOWN = 5
"""Number of finished downloads that are listed, the latest first."""
NEWS_SECONDS = 60.0
"""How long a finished download is announced; longer than the longest poll interval."""

_STAGE_WORDS: dict[SwitchStage, str] = {
    "requested": "Getting ready",
    "checking_memory": "Checking memory",
    "downloading": "Downloading",
    "draining": "Letting answers under way finish",
    "unloading": "Unloading",
    "waiting_for_memory": "Waiting until the memory is free",
    "loading": "Loading",
    "warming_up": "Warming up",
    "cancelling": "Cancelling",
    "rolling_back": "Restoring previous models",
}
_STATE_WORDS: dict[ModelState, str] = {
    "running": "Ready",
    "loading": "Loading",
    "unloading": "Unloading",
    "asleep": "Asleep",
    "failed": "Failed",
    "stopped": "",
}
_LOAD_WORDS = {
    "downloading": "Downloading",
    "loading_weights": "Reading the weights",
    "initializing_gpu": "Preparing the device",
    "warming_up": "Warming up",
}
_TRY = {
    "insufficient_memory": "",  # the reason says what can be done, which depends on the limit
    "memory_not_freed": "Close the program that holds the memory, then try again.",
    "pinned": "Unpin a model to make room, or choose a smaller one.",
    "model_unusable": "Replace the model's file, or choose another model.",
    "confirmation_required": "Look at what would be unloaded, then confirm.",
}
_TRY_ANYWAY = "Try again, or choose another model."
_DOWNLOAD_NEWS = {
    "queued": "{model} waits to be downloaded.",
    "downloading": "{model} is being downloaded.",
    "verifying": "{model} is being downloaded.",
    "paused": "The download of {model} is paused.",
    "complete": "{model} is downloaded.",
    "failed": "{model} could not be downloaded. {why}",
    "cancelled": "The download of {model} was cancelled.",
}
_SERVICE_NEWS: dict[ServiceState, str] = {
    "running": "Ollama is running.",
    "stopped": "Ollama is not running.",
    "starting": "Ollama is starting.",
    "stopping": "Ollama is being stopped.",
    "failed": "Ollama has failed. {error}",
    "unreachable": "Ollama can't be reached. {error}",
}


@dataclass(frozen=True, slots=True)
class Banner:
    """The switch or the lost model that the banner is about, and its tone."""

    tone: Tone
    switch: SwitchView | None = None
    loss: Loss | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """How every page shows a model's state: in words, by the mark and colour of a state (`drawn`), and in percent."""

    word: str
    drawn: ModelState
    percent: int | None


@dataclass(frozen=True, slots=True)
class Live:
    """The status and its wording at one moment; `service` is the local Ollama's status."""

    status: Status
    now: float
    downloads: tuple[Download, ...] = ()
    service: ServiceStatus | None = None
    docker: DockerStatus = UNUSED

    @property
    def moment(self) -> tuple[object, ...]:
        """Equal for two objects that render the same, which need not be rendered twice."""
        return (self.status, self.downloads, self.service, self.docker, int(self.now / CACHE_SECONDS))

    @property
    def active(self) -> ModelStatus | None:
        """The active model."""
        return self.status.model(self.status.active_model) if self.status.active_model else None

    @property
    def subject(self) -> ModelStatus | None:
        """The model that header, menu button and composer are about: the one being loaded, else the active one.

        A load that is being cancelled counts until it is undone.
        """
        return next((m for m in self.text_models if m.state == "loading" or self._is_cancelled(m)), self.active)

    @property
    def text_models(self) -> tuple[ModelStatus, ...]:
        """The models to chat with."""
        return tuple(model for model in self.status.models if model.kind == "text")

    @property
    def loads_aside(self) -> bool:
        """Whether the switch under way is to a model of another kind, so that the active one stays active."""
        target = self.status.model(self.status.switch.to_model) if self.status.switch else None
        return target is not None and target.kind != "text"

    def look(self, model: ModelStatus) -> Look:
        """Return how a model's state is shown."""
        leaving = self._is_cancelled(model) or model.drain_until is not None
        return Look(self.word(model), "unloading" if leaving else model.state, None if leaving else self.percent(model))

    def word(self, model: ModelStatus) -> str:
        """Return the word for a model's state; empty for a model that is not loaded."""
        if self._is_cancelled(model):
            return "Cancelling"
        if model.state == "loading":
            percent = self.percent(model)
            return "Loading" if percent is None else f"Loading {percent} %"
        if model.drain_until is not None:
            return self._finishing(model)
        return _STATE_WORDS[model.state]

    @property
    def moving_looks(self) -> dict[str, Look]:
        """Looks of the models whose looks may change with time alone."""
        return {model.id: self.look(model) for model in self.status.models if model.moving}

    def _is_cancelled(self, model: ModelStatus) -> bool:
        """Whether its load was cancelled and is being undone; its engine may still be loading, or already unloading."""
        switch = self.status.switch
        if switch is None or switch.stage != "cancelling" or switch.to_model != model.id:
            return False
        return model.state in ("loading", "unloading")

    def _finishing(self, model: ModelStatus, of: str = "") -> str:
        """Say what an unload waits for: how many answers, and how long at most."""
        if not model.in_flight:
            return f"Unloading{of and f' {model.id}'}"
        left = math.ceil((model.drain_until or 0.0) - self.now)
        answers = "1 answer" if model.in_flight == 1 else f"{model.in_flight} answers"
        return f"Finishing {answers}{of}" + (f", at most {duration(left)} more" if left > 0 else "")

    def percent(self, model: ModelStatus) -> int | None:
        """Return a model's progress; the whole switch's if it is the target, so that pages show a single figure."""
        switch = self.status.switch
        if model.state == "loading" and switch is not None and switch.to_model == model.id:
            return self.switch_percent
        return model.load.percent if model.load else None

    @property
    def switch_percent(self) -> int | None:
        """Progress of the switch under way; None without a forecast or count, when only the elapsed time is known.

        While previous models are restored it is the progress of the model being loaded, since the switch itself failed.
        """
        switch = self.status.switch
        if switch is not None and switch.stage == "rolling_back":
            restored = self.status.model(switch.detail) if switch.detail is not None else None
            return restored.load.percent if restored is not None and restored.load is not None else None
        if switch is None or (switch.eta_seconds is None and switch.basis != "measured"):
            return None
        return switch.percent

    @property
    def banner(self) -> Banner | None:
        """The banner to show, if any.

        A switch under way; a failed one until it is dismissed; one that succeeded or was cancelled, for a moment; a
        lost model until it is dismissed or a later switch has ended.
        """
        if self.status.switch is not None:
            return Banner("moving", self.status.switch)
        last, loss = self.status.last_switch, self.status.loss
        if loss is not None and (last is None or (last.finished_at or 0.0) < loss.at):
            return Banner("lost", loss=loss)
        if last is None or last.stage not in ("ready", "cancelled", "failed", "refused", "rolled_back"):
            return None
        if last.stage not in ("ready", "cancelled"):
            return Banner("failed", last)
        fresh = self.now - (last.finished_at or 0.0) < GOOD_NEWS_SECONDS
        return Banner("ready" if last.stage == "ready" else "cancelled", last) if fresh else None

    @property
    def poll_seconds(self) -> int:
        """Seconds until the next poll: 1 to hide a banner, 2 while something changes, else 5."""
        if self.banner is not None and self.banner.tone in ("ready", "cancelled"):
            return 1
        return 2 if self.moving or any(d.moving or d.state == "queued" for d in self.downloads) else 5

    @property
    def moving(self) -> bool:
        """Whether something changes that ends within minutes: a switch, or a service starting or stopping."""
        return self.status.moving or (self.service is not None and self.service.state in ("starting", "stopping"))

    @property
    def no_pulls(self) -> str | None:
        """Why nothing can be downloaded from Ollama now; None if it can."""
        if self.service is None or self.service.state == "running":
            return None
        why = {"unreachable": "can't be reached", "starting": "is starting"}.get(self.service.state)
        why = why or ("is not running" if self.service.binary else "is not installed")
        return f"These come from Ollama, which {why}."

    @property
    def jobs(self) -> list[Download]:
        """The downloads to list: those under way in order, then the latest finished ones.

        Cancelled ones are not listed.
        """
        ended = [d for d in self.downloads if d.state in ("complete", "failed")]
        ended.sort(key=lambda d: d.finished_at or d.created_at, reverse=True)
        return [*(d for d in self.downloads if not d.final), *ended[:ENDED_SHOWN]]

    def download(self, model: str) -> Download | None:
        """Return the unfinished download of a model, by its name at the source."""
        return next((d for d in self.downloads if d.model == model and not d.final), None)

    @property
    def draining(self) -> ModelStatus | None:
        """The model that finishes its answers before the switch under way unloads it."""
        switch = self.status.switch
        if switch is None or switch.stage != "draining" or switch.detail is None:
            return None
        return self.status.model(switch.detail)

    @property
    def stage(self) -> str:
        """What the switch under way is doing, with figures."""
        model = self.draining
        return self._step if model is None else self._finishing(model, f" of {model.id}")

    @property
    def _step(self) -> str:
        """What the switch under way is doing, without figures, for screen readers."""
        switch = self.status.switch
        if switch is None:
            return ""
        target = self.status.model(switch.to_model)
        if switch.stage == "loading" and target is not None and target.load is not None:
            return _LOAD_WORDS.get(target.load.stage, _STAGE_WORDS["loading"])
        return _STAGE_WORDS.get(switch.stage, switch.stage.replace("_", " ").capitalize())

    @property
    def restoring(self) -> bool:
        """Whether a switch failed, and the models it unloaded are being loaded again."""
        return self.status.switch is not None and self.status.switch.stage == "rolling_back"

    @property
    def cancelling(self) -> bool:
        """Whether a switch was cancelled and isn't over yet."""
        return self.status.switch is not None and self.status.switch.stage == "cancelling"

    @property
    def headline(self) -> str | None:
        """The step to show as headline while a switch restores or is cancelled; None while it loads its target."""
        switch = self.status.switch
        return self._step if switch is not None and switch.stage in ("rolling_back", "cancelling") else None

    @property
    def device(self) -> str | None:
        """The device that the switch loads onto, if there is more than one."""
        target = self.status.model(self.status.switch.to_model) if self.status.switch else None
        if target is None or len(self.status.devices) < 2:
            return None
        return next((d.name for d in self.status.devices if d.id == target.device), None)

    @property
    def slow(self) -> bool:
        """Whether the wait is long enough to say that leaving the page is fine."""
        return self.status.switch is not None and (self.status.switch.eta_seconds or 0) > LONG_SECONDS

    @property
    def lock(self) -> str | None:
        """Why no message can be sent now, and until when; None if one can.

        While the target of a switch is still being downloaded, or is none to chat with, the active model goes on
        answering.
        """
        switch = self.status.switch
        answers = self.active is not None and self.active.state == "running"
        goes_on = self.loads_aside or (answers and switch is not None and switch.stage == "downloading")
        if switch is not None and not goes_on:
            what = self._switching(switch)
            return what if switch.eta_seconds is None else f"{what}, {about(switch.eta_seconds)}"
        if self.active is None:
            return "Choose a model to start" if self.text_models else "Add a model to start"
        if self.active.drain_until is not None:
            return f"{self.active.id} is being unloaded"
        if self.active.state == "running":
            return None
        return f"{self.active.id} is {'loading' if self.active.state == 'loading' else 'not ready'}"

    def _switching(self, switch: SwitchView) -> str:
        if self.restoring:
            return self._step
        return f"{'Cancelling the switch' if switch.stage == 'cancelling' else 'Switching'} to {switch.to_model}"

    @property
    def running_now(self) -> str:
        """What answers after a failed switch or the loss of a model."""
        if self.active is None or self.active.state != "running":
            return "No model is loaded now."
        if self.banner is not None and self.banner.loss is not None:
            return f"{self.active.id} answers now."
        last = self.status.last_switch
        restored = [name for name in (last.restored if last is not None else ()) if self._runs(name)]
        if self.active.id in restored:
            return running_again(restored)
        moved = last is not None and any(u.model == self.active.id for u in last.unloads)
        now = f"{self.active.id} is {'running' if moved else 'still running'}."
        return f"{running_again(restored)} {now}".strip()

    def _runs(self, model_id: str) -> bool:
        model = self.status.model(model_id)
        return model is not None and model.state == "running"

    @property
    def cause(self) -> str:
        """Why the last switch failed, and what that cost."""
        last = self.status.last_switch
        return (last.message if last is not None else None) or "The engine gave no reason."

    @property
    def what_to_try(self) -> str:
        last = self.status.last_switch
        return _TRY.get((last.error or "") if last else "", _TRY_ANYWAY)

    @property
    def announcement(self) -> str:
        """Lines for screen readers; each is read once, when it appears. Steps, never percentages."""
        return "\n".join([self._switch_news, *self._download_news, *self._service_news])

    @property
    def _switch_news(self) -> str:
        banner = self.banner
        if banner is not None and banner.loss is not None:
            return f"{banner.loss.model} ended by itself. {banner.loss.cause} {self.running_now}"
        if banner is not None and banner.switch is not None:
            to_model, what = banner.switch.to_model, self._switching(banner.switch)
            return {
                "moving": f"{what}." if self.headline else f"{what}: {self._step}.",
                "ready": f"{to_model} is ready.",
                "cancelled": f"The switch to {to_model} was cancelled. {self.running_now}",
                "failed": f"{to_model} could not be loaded. {self.cause} {self.running_now}",
            }[banner.tone]
        if self.active is not None and self.active.state == "running":
            return f"{self.active.id} is ready."
        return "No model is loaded."

    @property
    def _download_news(self) -> list[str]:
        """Lines about unfinished downloads, and those that finished a moment ago."""
        return [
            _DOWNLOAD_NEWS[d.state].format(model=d.model, why=d.message)
            for d in self.downloads
            if not d.final or self.now - (d.finished_at or 0.0) < NEWS_SECONDS
        ]

    @property
    def _service_news(self) -> list[str]:
        said = [self.docker.error or "", "Docker is running." if self.docker.state == "running" else ""]
        if self.service is not None:
            said.insert(0, _SERVICE_NEWS[self.service.state].format(error=self.service.error or ""))
        return [line for line in said if line]

    def asks_first(self, target: str) -> SwitchView | None:
        """Return the switch that a switch to `target` would abandon, if it is more than half done."""
        switch = self.status.switch
        if switch is None or switch.to_model == target or switch.percent <= ASK_FROM_PERCENT:
            return None
        return switch
