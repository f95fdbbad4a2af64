"""A client of the gateway, in memory: it waits in the queue, reads its answer, or disconnects at any moment."""

from __future__ import annotations

import json
from collections.abc import Callable

from werkzeug.exceptions import HTTPException

from blueprints.api.relaying import Client, RelayedResponse, relay_request
from services.catalog import UnknownModel
from services.gateway.relay import Relay
from services.gateway.router import Admission, ClientGone, GatewayError, Router
from tests.heart.virtual import VirtualScheduler

PATH = "/v1/chat/completions"


class ClientRequest(Client):
    """One request and its outcome, which is None until it has ended.

    Outcomes: "answered", "aborted" (the answer had begun), "disconnected", a code of `GatewayError`, or the name of the
    exception that a view would have raised.
    """

    def __init__(self, number: int, model: str, act: str, seconds: float, scheduler: VirtualScheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self.number = number
        self.model = model
        self.act = act
        self.seconds = seconds
        self.gone = False
        self.outcome: str | None = None
        self.ended_at: float | None = None
        self.status: int | None = None
        self.received = b""
        self.admission: Admission | None = None
        self.watched = False
        self._act: Callable[[], None] | None = None

    def disconnected(self) -> bool:
        return self.gone

    def on_disconnect(self, act: Callable[[], None]) -> Callable[[], None]:
        assert not self.watched
        self.watched, self._act = True, act
        if self.gone:  # an already closed socket is reported at the hub's next turn
            self._scheduler.spawn("hub", self.disconnect)

        def stop() -> None:
            self.watched, self._act = False, None

        return stop

    def disconnect(self) -> None:
        """Close the connection."""
        self.gone = True
        if self._act is not None:
            self._act()

    def run(self, router: Router, relay: Relay) -> None:
        """Send the request as a view and the web server do, and read the answer to its end."""
        outcome = "died"
        try:
            outcome = self._ask(router, relay)
        except ClientGone:
            outcome = "disconnected"
        except GatewayError as error:
            outcome = error.code
        except (UnknownModel, HTTPException) as error:
            outcome = type(error).__name__
        finally:
            assert self.outcome is None, "a request has ended twice"
            self.outcome, self.ended_at = outcome, self._scheduler.now()

    def _ask(self, router: Router, relay: Relay) -> str:
        self.admission = admission = router.admit(self.model, self.disconnected)
        body = {"model": self.model, "number": self.number, "act": self.act, "seconds": self.seconds}
        response = relay_request(relay, admission, self, "POST", PATH, b"", json.dumps(body).encode())
        self.status = response.status
        return self._read(response)

    def _read(self, response: RelayedResponse) -> str:
        """Read like gunicorn: each piece is written to the client, which fails once that has disconnected."""
        try:
            for piece in response.body:
                if self.gone:
                    return "disconnected"
                self.received += piece
        except ConnectionResetError:
            return "disconnected" if self.gone else "aborted"
        finally:
            response.body.close()
        return "disconnected" if self.gone else "aborted" if b"engine_failed" in self.received else "answered"
