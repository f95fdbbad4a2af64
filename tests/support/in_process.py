"""The app without a server: Flask's test client with a board that the test fills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app import create_app
from services.container import Services
from services.engines.port import Endpoint, Model
from services.switching.events import InstanceState, InstanceView, LoadView, SwitchView
from services.switching.jobs import SwitchError
from services.switching.traffic import Traffic
from tests.support.console import DEMO_MODELS, NOTHING_LOCAL


class InProcess:
    """An app whose services are built but not started. `switch_requests` lists the models of calls to the switcher."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.services: Services = app.extensions["switchyard"]
        self.client: FlaskClient = app.test_client()
        self.switch_requests: list[str] = []

    def reset(self) -> None:
        """Return to the first state: nothing is loaded, no switch was requested."""
        self.services.board.publish(
            instances=MappingProxyType({}),
            failures=MappingProxyType({}),
            active_model=None,
            switch=None,
            last_switch=None,
            loss=None,
            queued=(),
        )
        self.switch_requests.clear()
        self.client = self.app.test_client()

    def close(self) -> None:
        self.services.relay.close()
        self.services.close()

    def show(
        self,
        model: str,
        state: InstanceState = "running",
        *,
        engine: str = "llamacpp",
        origin: str = "http://127.0.0.1:9",
        load: LoadView | None = None,
    ) -> InstanceView:
        """Put a model on the board; it becomes the active one if it runs and there is none."""
        board = self.services.board
        entry = self.services.catalog.models.get(model) or Model(model, engine, source=model)
        view = InstanceView(model, engine, state, "host", Traffic(), entry, endpoint=Endpoint(origin), load=load)
        active = board.current.active_model or (model if state == "running" else None)
        instances = MappingProxyType({**board.current.instances, model: view})
        board.publish(instances=instances, active_model=active)
        return view

    def show_switch(self, to_model: str, *, over: bool = False, **fields: Any) -> SwitchView:
        """Put a switch on the board: under way, or over."""
        view = SwitchView("s", to_model, None, fields.pop("requested_by", "api"), 0.0, **fields)
        self.services.board.publish(**{"last_switch" if over else "switch": view})
        return view

    def _note(self, model_id: str, **_options: object) -> None:
        self.switch_requests.append(self.services.catalog.get(model_id).id)
        raise SwitchError("stopping", "The test has no switcher.")


@contextmanager
def in_process(folder: Path, **settings: object) -> Iterator[InProcess]:
    """Such an app with its state in `folder`; the settings are create_app's."""
    with pytest.MonkeyPatch.context() as patch:
        (folder / "none.toml").touch()
        patch.setenv("SWITCHYARD_CONFIG", str(folder / "none.toml"))
        values: dict[str, Any] = {
            "state_dir": folder / "state",
            "models_dir": DEMO_MODELS,
            **NOTHING_LOCAL,
            **settings,
        }
        console = InProcess(create_app(**values))
        patch.setattr(console.services.switcher, "switch", console._note)
        patch.setattr(console.services.switcher, "restart", console._note)
        patch.setattr(console.services.switcher, "wait_first_pass", lambda _timeout: True)
        yield console
        console.close()
