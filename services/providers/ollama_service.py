"""`ollama serve` as a local service: what is Ollama's own about starting and explaining it.

Relies on this behaviour of Ollama 0.24.0: it logs requests to stdout, everything else to stderr; SIGTERM ends it within
10 ms with exit code 0; SIGKILL leaves its runner, a child in its process group; if its port is taken it exits with 1
and `Error: listen tcp 127.0.0.1:11434: bind: address already in use`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from services.engines.ollama.watch import OllamaWatch
from services.engines.processes import ProcessRegistry
from services.engines.server_address import Address
from services.engines.supervisor import STOP_GRACE_SECONDS, Command, ServiceError, Supervisor

NAME = "ollama"
START_POLL_SECONDS = 0.05
CAUSE_LINE = re.compile(r"^(?:Error: |(?=panic: |fatal error: |SIG[A-Z]+: ))(.+)", re.MULTILINE)
"""What Ollama, and the Go runtime, write to stderr when they exit with an error."""


def find_ollama(configured: str | None) -> str | None:
    """Return the ollama program: the configured one or the one on PATH; None if it is missing or not executable."""
    return shutil.which(str(Path(configured).expanduser()) if configured else NAME)


class OllamaProgram:
    """`ollama serve`. `environment` returns, at each start, what to add to our environment."""

    name = NAME
    title = "Ollama"
    address_setting = "ollama_base_url"
    log_name = "ollama-serve"
    check_seconds = START_POLL_SECONDS

    def __init__(
        self,
        watch: OllamaWatch,
        authority: str,
        find_binary: Callable[[], str | None],
        environment: Callable[[], Mapping[str, str]],
    ) -> None:
        self._watch = watch
        self._authority = authority
        self._find_binary = find_binary
        self._environment = environment

    def find(self) -> str | None:
        return self._find_binary()

    def command(self) -> Command:
        binary = self._find_binary()
        if binary is None:
            raise ServiceError(
                "ollama_not_found",
                "Ollama is not installed here, or not where the setting ollama_binary says: install it from "
                "https://ollama.com/download, or name the program in the setting ollama_binary.",
            )
        # One line per request goes to stdout: our own polls would drown everything else.
        environment = {**self._environment(), "OLLAMA_HOST": self._authority}
        return Command((binary, "serve"), environment, discard_stdout=True)

    def not_executable(self, program: str, reason: str) -> str:
        return f"The program {program} can't be started: {reason}. Check the setting ollama_binary."

    def check(self) -> None:
        self._watch.check_health()

    def cause_in(self, log: str) -> str | None:
        telling = CAUSE_LINE.search(log)
        return None if telling is None else telling[1]


class OllamaService(Supervisor):
    """The Ollama that `watch` polls: its status and, if it is on this machine, its start and stop."""

    def __init__(
        self,
        watch: OllamaWatch,
        registry: ProcessRegistry,
        *,
        find_binary: Callable[[], str | None],
        environment: Callable[[], Mapping[str, str]] = dict,
        on_change: Callable[[], None] = lambda: None,
        start_timeout: float = 15.0,
        stop_grace: float = STOP_GRACE_SECONDS,
    ) -> None:
        address = Address.parse(watch.api.base_url)
        super().__init__(
            OllamaProgram(watch, address.authority, find_binary, environment),
            address,
            registry,
            on_change=on_change,
            start_timeout=start_timeout,
            stop_grace=stop_grace,
        )
        watch.on_health(self.note)

    @property
    def reachable(self) -> bool:
        """Whether it answered the last health check."""
        return self.status().state == "running"

    @property
    def log_path(self) -> Path | None:
        """Log of the server that we started; None without one."""
        process = self.process
        return None if process is None else process.log_path
