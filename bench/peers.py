"""Other gateways that are on the PATH, each in front of the same stand-in engine as Switchyard.

    llama-swap                  starts the stand-in itself, as its only model
    LiteLLM                     is pointed at the stand-in that Switchyard runs
    llama-server, router mode   starts a copy of its own program per model: here, a copy that is replaced by the
                                stand-in once the router is up, because a real engine would take nearly all of the time

Their limits on requests at once are raised above the load; everything else is left at its default. A gateway that
doesn't start, or answers wrongly, raises PeerError: it costs its own rows, never the run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench import wire
from bench.rig import FAKE_MODEL, Rig
from tests.support.console import free_port

REQUESTS_AT_ONCE = 1000
"""To one model of llama-swap; its default of ten answers the others with 429."""
ROUTER_THREADS = 64
"""llama-server's router needs one for each connection, for as long as that is kept alive."""
READY_SECONDS = 90.0
"""LiteLLM imports for ten seconds or more before it answers."""
LOOK_SECONDS = 0.1
ANSWER_SECONDS = 10.0
VERSION_SECONDS = 30.0
END_SECONDS = 10.0
VERSION_NUMBER = re.compile(r"\d[\w.]*")


class PeerError(Exception):
    """A gateway that could not be measured. The text says why, in part of a sentence."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a gateway is configured with: `engine` is the stand-in as a program, `engine_port` one that runs already."""

    program: Path
    folder: Path
    port: int
    engine: Path
    engine_port: int
    model_file: Path


@dataclass(frozen=True, slots=True)
class Launch:
    """How a gateway is started; `once_up` is called as soon as it answers `GET /health`."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    once_up: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """One gateway: its name in the table, its program's, and how it is configured and started."""

    name: str
    program: str
    prepare: Callable[[Setup], Launch]

    @property
    def found(self) -> Path | None:
        """The program, if it is on the PATH."""
        path = shutil.which(self.program)
        return None if path is None else Path(path)

    def version(self) -> str:
        """The version number that the program prints; empty if it prints none."""
        with suppress(OSError, subprocess.TimeoutExpired):
            asked = subprocess.run(
                [str(self.found), "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=VERSION_SECONDS,
                check=False,
            )
            lines = f"{asked.stdout}\n{asked.stderr}".splitlines()
            found = (VERSION_NUMBER.search(line) for line in lines if "version" in line.lower())
            return next((number[0] for number in found if number), "")
        return ""

    @contextmanager
    def running(self, rig: Rig, engine_port: int, ready_seconds: float = READY_SECONDS) -> Iterator[int]:
        """Run the gateway; yield its port once it has relayed a whole answer. It ends with the context.

        Raises PeerError if it ends or has not answered within `ready_seconds`.
        """
        if self.found is None:
            raise PeerError(f"{self.program} is not on the PATH")
        folder = rig.folder / f"peer-{self.program}"
        folder.mkdir(exist_ok=True)
        setup = Setup(self.found, folder, free_port(), rig.fake_engine_program, engine_port, rig.model_file)
        log = folder / "log"
        with _process(self.prepare, setup, log) as (process, launch):
            deadline = time.monotonic() + ready_seconds
            if launch.once_up is not None:
                _wait(lambda: _is_up(setup.port), process, log, deadline)
                launch.once_up()
            _wait(lambda: _relays(setup.port), process, log, deadline)
            yield setup.port


def _llama_swap(setup: Setup) -> Launch:
    command = f"{setup.engine} --model {setup.model_file} --alias {FAKE_MODEL} --port ${{PORT}}"
    entry = {"cmd": command, "concurrencyLimit": REQUESTS_AT_ONCE}
    config = _written(setup.folder / "config.yaml", json.dumps({"models": {FAKE_MODEL: entry}}))  # JSON is YAML
    return Launch([str(setup.program), "--config", config, "--listen", f"127.0.0.1:{setup.port}"])


def _litellm(setup: Setup) -> Launch:
    upstream = {
        "model": f"openai/{FAKE_MODEL}",
        "api_base": f"http://127.0.0.1:{setup.engine_port}/v1",
        "api_key": "none",
    }
    document = {"model_list": [{"model_name": FAKE_MODEL, "litellm_params": upstream}]}
    config = _written(setup.folder / "config.yaml", json.dumps(document))
    return Launch(
        [str(setup.program), "--config", config, "--host", "127.0.0.1", "--port", str(setup.port)],
        # Neither telemetry nor the list of prices, which it fetches at each start.
        {"LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
    )


def _router(setup: Setup) -> Launch:
    """The router starts the program that it was itself started from, by its path: /proc/self/exe, read at the start."""
    original = setup.program.resolve()
    program = setup.folder / "llama-server"
    shutil.copy2(original, program)
    replacement = setup.folder / "stand-in"
    replacement.write_text(f'#!/bin/sh\nunset LD_LIBRARY_PATH\nexec {shlex.quote(str(setup.engine))} "$@"\n')
    replacement.chmod(0o755)
    preset = _written(setup.folder / "models.ini", f"version = 1\n\n[{FAKE_MODEL}]\nmodel = {setup.model_file}\n")
    libraries = os.pathsep.join(filter(None, (str(original.parent), os.environ.get("LD_LIBRARY_PATH"))))
    address = ("--host", "127.0.0.1", "--port", str(setup.port))
    return Launch(
        [str(program), "--models-preset", preset, *address, "--threads-http", str(ROUTER_THREADS)],
        {"LD_LIBRARY_PATH": libraries, "LLAMA_CACHE": str(setup.folder)},  # an empty cache: no other models
        lambda: replacement.replace(program),
    )


PEERS = (
    Peer("llama-swap", "llama-swap", _llama_swap),
    Peer("LiteLLM", "litellm", _litellm),
    Peer("llama-server's router", "llama-server", _router),
)


@contextmanager
def _process(
    prepare: Callable[[Setup], Launch], setup: Setup, log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Launch]]:
    """The gateway as a process, ended with everything that it started. Raises PeerError if it can't be started."""
    try:
        launch = prepare(setup)
        with log.open("wb") as out:
            process = subprocess.Popen(
                launch.argv,
                cwd=setup.folder,
                env={**os.environ, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
    except OSError as error:
        raise PeerError(f"it can't be started: {error.strerror}") from error
    try:
        yield process, launch
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a gateway and everything that it started, even if it has ended itself.

    It is stopped first, so that it starts nothing meanwhile.
    """
    below: list[psutil.Process] = []
    with suppress(psutil.Error):
        gateway = psutil.Process(process.pid)
        gateway.suspend()
        below = gateway.children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_SECONDS)
    for child in below:
        with suppress(psutil.Error):
            child.kill()


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    while not condition():
        if process.poll() is not None:
            raise PeerError(f"it ended with {process.returncode}{_last_line(log)}")
        if time.monotonic() > deadline:
            raise PeerError(f"it did not become ready{_last_line(log)}")
        time.sleep(LOOK_SECONDS)


def _is_up(port: int) -> bool:
    return _status(port, wire.get("/health")) == 200


def _relays(port: int) -> bool:
    body = {"model": FAKE_MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    return _status(port, wire.post("/v1/chat/completions", body)) == 200


def _status(port: int, request: bytes) -> int | None:
    try:
        with wire.Wire(port, ANSWER_SECONDS) as connection:
            return connection.ask(request).status
    except (OSError, wire.WireError):
        return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:120]}" if last else ""


def _written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)
