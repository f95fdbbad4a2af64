"""Downloads what a local server loads, before memory is freed for it, by the servers' own program `download.py`.

A server would download by itself, but only once the models that it displaces are gone.
"""

from __future__ import annotations

import json
from typing import Any

from services.cancellation import CancelToken
from services.engines.child_runs import Silent, run_child
from services.engines.port import EngineError, Evidence, Report
from services.engines.processes import ProcessRegistry
from services.engines.python_server.about import About
from services.engines.python_server.packages import Packages
from services.engines.python_server.program import LAST_ERROR, Order
from services.sizes import format_part

PROGRAM = "download.py"
SILENCE_SECONDS = 300.0
"""How long nothing may come; the listing of a repository, which writes nothing, takes seconds."""


class Weights:
    """The files of one server's models. What was complete once in this run of the app is not asked for again."""

    def __init__(self, about: About, packages: Packages, registry: ProcessRegistry) -> None:
        self._about = about
        self._packages = packages
        self._registry = registry
        self._complete: set[Order] = set()

    def fetch(self, order: Order, report: Report, token: CancelToken) -> None:
        """Block until everything is there, as `Engine.fetch`. Raises EngineError and Cancelled."""
        program = self._packages.servers_dir / PROGRAM
        if order in self._complete or not program.is_file():
            return
        argv = [self._packages.python, str(program), self._about.name, f"--model={order.model}", *order.arguments]
        errors: list[str] = []

        def on_line(line: str) -> None:
            said = _document(line)
            done, total = said.get("completed_bytes"), said.get("total_bytes")
            if isinstance(said.get("error"), str):
                errors.append(said["error"])
            elif isinstance(done, int) and isinstance(total, int) and total > 0:
                done = max(0, min(done, total))
                report(Evidence("downloading", done / total, f"{format_part(done, total)} downloaded"))

        trouble = f"What {self._about.title} loads could not be downloaded"
        try:
            process = run_child(
                argv,
                self._registry,
                f"{self._about.name}-download",
                on_line,
                token,
                silence_seconds=SILENCE_SECONDS,
                environment=dict(order.environment),
            )
        except OSError as error:
            raise EngineError(f"{trouble}: {error.strerror or error}.") from None
        except Silent:
            words = f"nothing came for {SILENCE_SECONDS / 60:.0f} minutes. Check the network and try again."
            raise EngineError(f"{trouble}: {words}") from None
        if process.exit_code != 0:
            found = errors or LAST_ERROR.findall(process.log_tail())
            cause = found[-1].rstrip(".") if found else f"it {process.describe_end()}"
            raise EngineError(f"{trouble}: {cause}.")
        self._complete.add(order)


def _document(line: str) -> dict[str, Any]:
    try:
        said = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
