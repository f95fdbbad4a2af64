"""Test rig of the benchmarks: consoles and fake engines in processes of their own, all ended with the run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.support.console import ROOT, Console, wait_until

UPSTREAM = Path(__file__).with_name("upstream.py")
FAKE_MODEL = "bench-model"
SLOW_MODEL = "bench-slow"
SHORT = 20
LEAST_SECONDS = 0.3
"""A short run does a twentieth, for as long as this at least."""
SLOW_BYTES = 256_000_000
"""Much more than a Python process reads to start, so that reading this file is distinguishable from that."""


class Rig:
    """The run's temporary folder and everything started in it. A context manager.

    A `short` run does everything, but so little of it that its figures say nothing.
    """

    def __init__(self, models_dir: Path, *, short: bool = False) -> None:
        self.models_dir = models_dir
        self.short = short
        self._exits = ExitStack()

    def __enter__(self) -> Rig:
        self.folder = Path(tempfile.mkdtemp(prefix="switchyard-bench-"))
        self._exits.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._exits.close()

    def times(self, usual: int) -> int:
        """How often to repeat something that a whole run repeats `usual` times."""
        return max(1, usual // SHORT) if self.short else usual

    def seconds(self, usual: float) -> float:
        """How long to do something that a whole run does for `usual` seconds."""
        return max(LEAST_SECONDS, usual / SHORT) if self.short else usual

    @cached_property
    def model_file(self) -> Path:
        """The smallest model in the folder."""
        files = sorted(self.models_dir.glob("*.gguf"), key=lambda file: file.stat().st_size)
        if not files:
            sys.exit(f"There is no GGUF file in {self.models_dir}. Name another folder with --models.")
        return files[0].resolve()

    @cached_property
    def fake_engine_console(self) -> Console:
        """A console whose running model is the fake engine; its other model loads slowly, as `load_plan` says.

        Started twice: creating the state folder imports code, and so takes memory, that later starts don't need.
        """
        console = self.new_fake_engine_console()
        if not self.short:
            console.start().stop()
        console.start()
        console.switch(FAKE_MODEL)
        return console

    def new_fake_engine_console(self) -> Console:
        """A console, not started yet, with both fake models."""
        return self.console(
            toml=self._catalogue(), models_dir=self.empty_folder, llamacpp_server=self.fake_engine_program
        )

    @cached_property
    def fake_engine_program(self) -> Path:
        """`upstream.py` as one executable, whatever file modes the checkout has."""
        program = self.folder / "llama-server"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(UPSTREAM))} "$@"\n')
        program.chmod(0o755)
        return program

    @property
    def load_plan(self) -> Path:
        """The file with the number of seconds that the next load of the slow model takes."""
        return self.folder / "load-plan"

    def console(self, *, models_dir: Path | None = None, toml: str = "", **settings: Any) -> Console:
        """A console that isn't started yet, with a state folder of its own; ended with the run."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        console = Console(folder, models_dir=models_dir or self.models_dir, toml=toml, log_level="warning", **settings)
        self._exits.callback(end, console)
        return console

    def _catalogue(self) -> str:
        """Entries of both fake models; the slow one's file is the real one, extended by a long hole."""
        self.load_plan.write_text("0")
        slow = self.folder / "slow.gguf"
        shutil.copyfile(self.model_file, slow)
        with slow.open("r+b") as file:
            file.truncate(max(SLOW_BYTES, self.model_file.stat().st_size))
        quick = _entry(FAKE_MODEL, self.model_file, [])
        return quick + _entry(SLOW_MODEL, slow, ["--load-plan", str(self.load_plan)])

    @cached_property
    def empty_folder(self) -> Path:
        """A folder without models."""
        folder = self.folder / "no-models"
        folder.mkdir(exist_ok=True)
        return folder


def worker(console: Console) -> psutil.Process:
    """The gunicorn worker of a console: its one child process that isn't an engine."""
    assert console.process is not None
    children = psutil.Process(console.process.pid).children()
    return next(child for child in children if "gunicorn" in " ".join(child.cmdline()))


def upstream_port(console: Console, model_id: str) -> int:
    """The port of the fake engine that serves a model, for direct requests."""
    for engine in console.engines():
        argv = engine.cmdline()
        if model_id in argv:
            return int(argv[argv.index("--port") + 1])
    raise LookupError(f"no process serves {model_id}")


def end(console: Console) -> None:
    """Stop a console and everything it started."""
    if console.process is not None and console.process.poll() is None:
        console.close()


def _entry(model_id: str, source: Path, arguments: list[str]) -> str:
    return (
        f"[[models]]\nid = {json.dumps(model_id)}\nsource = {json.dumps(str(source))}\n"
        f"[models.options]\narguments = {json.dumps(arguments)}\n"
    )


__all__ = ["FAKE_MODEL", "ROOT", "SLOW_MODEL", "Rig", "end", "upstream_port", "wait_until", "worker"]
