"""Where local adapters send their requests: to a model of the catalogue, through the gateway, or to a URL elsewhere.

Through the gateway, requests are counted like a client's: a switch waits for them, and the model they name is switched
to first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from services.cancellation import Cancelled, CancelToken
from services.catalog import Catalog, UnknownModel
from services.gateway.refusals import refusal_of
from services.gateway.relay import BrokenResponse, EngineResponse, Hangup, Relay
from services.gateway.router import ClientGone, GatewayError, Router
from services.http import ConnectionBroken, FetchError, Reply, TooLarge, TooSlow, fetch
from services.providers.adapters.replies import checked, words_of
from services.providers.ports import ProviderError
from services.scheduling import Scheduler, ThreadScheduler
from services.sizes import format_size
from services.switching.events import Board, InstanceView
from services.switching.jobs import Job, SwitchError, SwitchOptions
from services.switching.switcher import Switcher
from services.text import running_again

log = structlog.get_logger(__name__)

SWITCH_POLL_SECONDS = 0.1
ANSWER_SECONDS = 1800.0
"""Limit of one answer in all; a picture drawn on a processor takes many minutes."""
HEALTH_SECONDS = 5.0
LOADING_SECONDS = 5.0
JSON_HEADERS = b"Content-Type: application/json\r\n"


class Upstream(Protocol):
    """What answers a local adapter's requests."""

    @property
    def title(self) -> str:
        """What it is called in messages."""

    def make_ready(self, token: CancelToken) -> float:
        """Block until it answers; return the seconds that took. Raises ProviderError and Cancelled."""

    def post(self, path: str, body: Mapping[str, object], token: CancelToken, most_bytes: int) -> Reply:
        """Return its reply with status 200. Raises ProviderError and Cancelled; nothing is left running then."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """What a request to a model of the catalogue takes."""

    board: Board
    catalog: Catalog
    switcher: Switcher
    router: Router
    relay: Relay
    scheduler: Scheduler = field(default_factory=ThreadScheduler)


class CatalogModel:
    """A model of the catalogue."""

    def __init__(self, gateway: Gateway, model_id: str) -> None:
        self._gateway = gateway
        self.model_id = model_id
        self._displaced: tuple[str, ...] = ()
        """The models that were unloaded for it, the active one first."""

    @property
    def title(self) -> str:
        return self.model_id

    def make_ready(self, token: CancelToken) -> float:
        token.check()
        view = self._gateway.board.current.instances.get(self.model_id)
        if view is not None and view.state == "running":
            return 0.0
        began = self._gateway.scheduler.now()
        active = self._gateway.board.current.active_model
        job = self._switch(self.model_id, SwitchOptions(activate=False, lasting=False), token)
        self._displaced = tuple(sorted(job.unloaded, key=lambda model: model != active))
        return self._gateway.scheduler.now() - began

    def post(self, path: str, body: Mapping[str, object], token: CancelToken, most_bytes: int) -> Reply:
        token.check()
        gateway = self._gateway
        try:
            admission = gateway.router.admit(self.model_id, lambda: token.cancelled)
        except ClientGone:
            raise Cancelled from None
        except UnknownModel as error:
            raise ProviderError("provider_unavailable", str(error)) from None
        except GatewayError as error:
            raise _gateway_refused(error) from None
        view = admission.instance
        try:
            reply = self._ask(view, path, body, token, most_bytes)
        finally:
            admission.release()
        beside = self._others_beside(view)
        try:
            return checked(reply, self.title, beside)
        except ProviderError as error:
            if error.code != "out_of_memory":
                raise
            back = running_again(self._bring_back(token))
            raise ProviderError(error.code, f"{error.message} {back}".strip()) from None

    def _switch(self, model_id: str, options: SwitchOptions, token: CancelToken) -> Job:
        """Switch to a model and wait for the end. Raises ProviderError and Cancelled."""
        switcher = self._gateway.switcher
        try:
            job = switcher.switch(model_id, requested_by="studio", replace="queue", options=options)
            try:
                while not job.wait_done(SWITCH_POLL_SECONDS):
                    token.check()
            finally:  # a load that nobody waits for any more, and that has changed nothing, is cancelled
                if not options.lasting:
                    switcher.withdraw(job)
        except UnknownModel as error:
            raise ProviderError("provider_unavailable", str(error)) from None
        except SwitchError as error:
            raise _switch_refused(error) from None
        if job.error is not None:
            raise _switch_refused(job.error)
        return job

    def _bring_back(self, token: CancelToken) -> list[str]:
        """Load again what was unloaded for this model, which has too little memory to work; return what is back.

        The first one becomes the active model again if there is none.
        """
        displaced, self._displaced = self._displaced, ()
        back = []
        for model_id in displaced:
            try:
                self._switch(model_id, SwitchOptions(activate=False), token)
                back.append(model_id)
            except ProviderError as error:
                log.warning("a model is not loaded again after a lack of memory", model=model_id, reason=error.message)
        return back

    def _ask(
        self, view: InstanceView, path: str, body: Mapping[str, object], token: CancelToken, most_bytes: int
    ) -> Reply:
        assert view.endpoint is not None, "a running instance has an endpoint"
        if "model" in body:
            body = {**body, "model": view.endpoint.model or view.model}
        hangup = Hangup()
        try:
            with token.cancelling(hangup):
                answer = self._gateway.relay.send(
                    view.endpoint, "POST", path, JSON_HEADERS, json.dumps(body).encode(), hangup
                )
                try:
                    refused = refusal_of(answer, view)
                    if refused is not None:
                        raise refused
                    return _whole(answer, view, most_bytes, self.title)
                finally:
                    answer.close()
        except ClientGone:
            raise Cancelled from None
        except GatewayError as error:
            token.check()
            raise _gateway_refused(error) from None
        except ProviderError:
            token.check()
            raise

    def _others_beside(self, view: InstanceView) -> list[str]:
        """Return the other models on the same device that could be unloaded, the largest first."""
        here = self._gateway.board.current.instances.values()
        others = [
            (v.usage.bytes if v.usage else 0, v.model)
            for v in here
            if v.model != view.model and v.device == view.device and v.shares is None
            if not v.entry.remote and not v.entry.started_elsewhere
        ]
        return [model for _, model in sorted(others, reverse=True)]


class RemoteServer:
    """A local server's interface at a URL: on another machine, or one that is not in the catalogue."""

    def __init__(self, title: str, url: str) -> None:
        self.title = title
        self._url = url

    def make_ready(self, token: CancelToken) -> float:
        reply = self._fetch("GET", "/health", None, token, HEALTH_SECONDS, 100_000)
        try:
            status = reply.document().get("status")
        except ValueError:
            status = None
        if status == "loading":
            raise ProviderError("provider_unavailable", f"{self.title} is still loading its model.", LOADING_SECONDS)
        if status == "failed":
            why = words_of(reply) or "it gives no reason."
            raise ProviderError("provider_unavailable", f"{self.title} could not load its model: {why}")
        return 0.0

    def post(self, path: str, body: Mapping[str, object], token: CancelToken, most_bytes: int) -> Reply:
        return checked(self._fetch("POST", path, body, token, ANSWER_SECONDS, most_bytes), self.title)

    def _fetch(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        token: CancelToken,
        seconds: float,
        most_bytes: int,
    ) -> Reply:
        try:
            return fetch(method, f"{self._url}{path}", timeout=seconds, body=body, most_bytes=most_bytes, token=token)
        except TooSlow as error:
            raise ProviderError("provider_unavailable", f"{self.title} hangs or is overloaded: {error}.") from None
        except (ConnectionBroken, TooLarge) as error:
            raise ProviderError("bad_answer", f"{self.title}'s answer broke off: {error}.") from None
        except FetchError as error:
            raise ProviderError(
                "provider_unavailable",
                f"{self.title} does not answer at {self._url}: {error}. Start it, then try again.",
            ) from None


def _whole(answer: EngineResponse, view: InstanceView, most_bytes: int, title: str) -> Reply:
    """Read a whole response. Raises ProviderError if it breaks off, is too long or takes too long."""
    deadline = time.monotonic() + ANSWER_SECONDS
    pieces, size = [], 0
    try:
        while piece := answer.read_available():
            view.traffic.note_activity()
            pieces.append(piece)
            size += len(piece)
            if size > most_bytes or time.monotonic() > deadline:
                raise ProviderError("bad_answer", f"{title}'s answer has no end: {format_size(size)} came.")
    except TimeoutError:
        raise ProviderError("provider_unavailable", f"{title} fell silent in the middle of its answer.") from None
    except (OSError, BrokenResponse) as error:
        raise ProviderError("bad_answer", f"{title}'s answer broke off: {error}.") from None
    return Reply(answer.status_code, b"".join(pieces), {name.lower(): value for name, value in answer.headers})


def _switch_refused(error: SwitchError) -> ProviderError:
    short = error.code in ("insufficient_memory", "memory_not_freed") or "out of memory" in error.message.lower()
    code = "out_of_memory" if short else "provider_unavailable"
    advice = ""
    if error.code == "confirmation_required":
        advice = " The setting confirm_before_unload keeps a run from unloading models by itself."
    return ProviderError(code, f"{error.message}{advice}")


def _gateway_refused(error: GatewayError) -> ProviderError:
    if error.code == "insufficient_memory":
        return ProviderError("out_of_memory", error.message)
    if error.code == "queue_full":
        return ProviderError("rate_limited", error.message, float(error.retry_after or 1))
    return ProviderError("provider_unavailable", error.message, error.retry_after)
