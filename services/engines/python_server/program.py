"""The image server and the vision server as programs that a supervisor can start."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from services.engines.port import HOST_DEVICE
from services.engines.python_server.about import About
from services.engines.python_server.health import NO_REPORT, ask_health
from services.engines.python_server.packages import Packages
from services.engines.server_address import Address
from services.engines.supervisor import Command, Health, ServiceError

CHECK_SECONDS = 0.2
LAST_ERROR = re.compile(r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)|SystemExit): (.+)", re.MULTILINE)
"""The line that ends a traceback: the exception's type and text."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to serve at the next start: `--model`, the device that may be used, and what the settings add."""

    model: str
    device: str = HOST_DEVICE
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


class PythonServer:
    """`python SCRIPT --host … --port … --model …`. `report` is the latest answer of `GET /health`."""

    check_seconds = CHECK_SECONDS

    def __init__(self, about: About, address: Address, packages: Packages) -> None:
        self.name = about.name
        self.title = about.title
        self.address_setting = about.address_setting
        self.log_name = f"{about.name}-service"
        self.packages = packages
        self.order: Order | None = None
        self.report = NO_REPORT
        self.on_health: Callable[[Health], object] = lambda _: None
        self._address = address
        self._script = packages.servers_dir / about.script
        self._last_words: str | None = None
        """Why the load failed, in the server's own words, which it says for a moment before it exits."""

    def find(self) -> str | None:
        return str(self._script) if self._script.is_file() and not self.packages.missing() else None

    def command(self) -> Command:
        self.check_packages()
        order = self.order
        assert order is not None, "the engine says what to serve before it starts the server"
        self._last_words = None
        host = self._address.authority.rpartition(":")[0].strip("[]")
        argv = (
            *(self.packages.python, str(self._script)),
            *("--host", "127.0.0.1" if host == "localhost" else host, "--port", str(self._address.port)),
            *(f"--model={order.model}", *order.arguments),
        )
        # Its choice of a device follows ours, which the memory is planned for.
        visible = {"CUDA_VISIBLE_DEVICES": "" if order.device == HOST_DEVICE else order.device}
        return Command(argv, {"PYTHONUNBUFFERED": "1", **visible, **dict(order.environment)})

    def check_packages(self) -> None:
        """Raise ServiceError `packages_missing` if the server can't be started for lack of something."""
        missing = self.packages.missing()
        if not self._script.is_file():
            words = f"Its program {self._script} is missing. Check the setting local_servers_dir."
            raise ServiceError("packages_missing", f"{self.title} is not installed here. {words}")
        if missing:
            raise ServiceError(
                "packages_missing",
                f"{self.title} needs Python packages that are not installed: {', '.join(missing)}. "
                f'Install them from the page of services, with POST /api/providers/services/install {{"service": '
                f'"{self.name}"}}, or by hand from {self.packages.requirements}.',
            )

    def not_executable(self, program: str, reason: str) -> str:
        return f"The program {program} can't be started: {reason}. Check the setting local_servers_env."

    def check(self) -> None:
        report = ask_health(self._address.url, self.name, self.title, self.address_setting)
        if report.health.at >= self.report.health.at:
            self.report = report
        self._last_words = report.error or self._last_words
        self.on_health(report.health)

    def cause_in(self, log: str) -> str | None:
        if self._last_words is not None:
            return self._last_words
        errors = LAST_ERROR.findall(log)
        return errors[-1] if errors else None
