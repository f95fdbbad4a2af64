"""Where the milliseconds of a switch go: the time of each phase, by engine.

Each switch replaces one model by another of the same engine, since the console's memory budget has room for one of
them. A phase lasts from the event that begins it on the switch's stream to the one that begins the next; the first one
begins with the request. What is measured is Switchyard, not the engines: only the embedded one is real, with the
smallest model there is. Ollama is the tests' fake, and so is vLLM, in real containers of a Docker daemon of the run's
own, where that can be started.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from docker.errors import DockerException  # type: ignore[import-untyped]

from bench.rig import Rig
from tests.support.console import Console
from tests.support.docker import FAKE_VLLM_IMAGE, docker_engine
from tests.support.hub import TINY_MODEL, fill_cache
from tests.support.ollama import FakeOllama

CAPTION = "Milliseconds of each phase of a switch that replaces a model by another one of the same engine"
VLLM = "vLLM (fake, in Docker)"
SWITCHES = 6
PAUSE_SECONDS = 1.0
"""Between two switches, so that the standby process is ready, as it is between the switches of people."""
BUDGET_GB, MODEL_GB = 1.0, 0.995
"""A model needs what it declares to be loaded; the loaded one is counted with the megabytes that it really takes."""
FAKE_VLLM_SECONDS = 0.2
"""What the fake vLLM takes to load a model."""

PHASES = {
    "checking_memory": "plan",
    "unloading_models": "plan",
    "downloading": "download",
    "draining": "drain",
    "unloading": "unload",
    "waiting_for_memory": "wait for memory",
    "loading_target": "start",
    "loading_weights": "load weights",
    "initializing_gpu": "prepare device",
    "warming_up": "warm up",
}
"""The phase that an event begins, by the event's `phase`, else its `stage`; in order."""

Events = Iterable[tuple[float, str, Mapping[str, Any]]]
"""Time of arrival (any clock, in seconds), name and data of each event."""


class _Unavailable(Exception):
    """There is no Docker daemon for the run. The text says why."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The seconds of each phase, one mapping per switch; without a switch, `note` says why."""

    engine: str
    switches: Sequence[Mapping[str, float]] = ()
    note: str = ""


def measure(rig: Rig) -> Iterator[Timeline]:
    with ExitStack() as running:
        ollama = running.enter_context(
            FakeOllama(rig.folder / "ollama", models={"bench-a:latest": {}, "bench-b:latest": {}})
        )
        settings: dict[str, Any] = {"ollama_base_url": ollama.url, "ollama_binary": ollama.binary}
        models = {"embedded": _embedded(rig), "Ollama (fake)": _entries("ollama", "bench-a:latest", "bench-b:latest")}
        missing = ""
        try:
            settings |= _docker(rig, running)
            models[VLLM] = _vllm(rig)
        except _Unavailable as error:
            missing = str(error)
        toml = "".join(entry for entries in models.values() for entry in entries.values())
        console = rig.console(models_dir=rig.empty_folder, toml=toml, memory_budget_gb=BUDGET_GB, **settings).start()
        running.callback(console.close)
        for engine, entries in models.items():
            yield _of_engine(rig, console, engine, list(entries))
        if missing:
            yield Timeline(VLLM, note=f"not measured: {missing}")


def table(timelines: Iterable[Timeline]) -> str:
    """The medians in milliseconds as a Markdown table; a phase that no switch had is left out."""
    timelines = list(timelines)
    seen = {phase for timeline in timelines for switch in timeline.switches for phase in switch}
    phases = [phase for phase in dict.fromkeys(PHASES.values()) if phase in seen]
    lines = [f"| engine | {' | '.join(phases)} | total |", "|---" * (len(phases) + 2) + "|"]
    for timeline in timelines:
        if timeline.switches:
            cells = [
                _milliseconds(switch[phase] for switch in timeline.switches if phase in switch) for phase in phases
            ]
            total = _milliseconds(sum(switch.values()) for switch in timeline.switches)
        else:
            cells, total = ["–"] * len(phases), timeline.note
        lines.append(f"| {timeline.engine} | {' | '.join(cells)} | {total} |")
    return "\n".join(lines)


def phases(began: float, events: Events) -> Mapping[str, float]:
    """Return the seconds of each phase of one switch. Raises RuntimeError if it failed."""
    seconds: dict[str, float] = {}
    phase, since = "plan", began
    for at, name, data in events:
        if name == "error":
            raise RuntimeError(f"the switch failed: {data.get('message')}")
        seconds[phase] = seconds.get(phase, 0.0) + at - since
        phase, since = PHASES.get(str(data.get("phase", data.get("stage"))), phase), at
    return seconds


def _of_engine(rig: Rig, console: Console, engine: str, models: Sequence[str]) -> Timeline:
    """The first load isn't counted: it may have to unload another engine's model."""
    console.wait_for(lambda status: set(models) <= set(status["models"]), f"the models of {engine} to be listed")
    console.switch(models[0])
    switches = []
    for number in range(rig.times(SWITCHES)):
        time.sleep(rig.seconds(PAUSE_SECONDS))
        began = time.perf_counter()
        arrived = ((time.perf_counter(), *event) for event in console.switch_stream(models[(number + 1) % 2]))
        switches.append(phases(began, arrived))
    return Timeline(engine, switches)


def _embedded(rig: Rig) -> Mapping[str, str]:
    files = [rig.folder / f"timeline-{letter}.gguf" for letter in "ab"]
    for file in files:
        shutil.copyfile(rig.model_file, file)
    return {file.stem: _entry("llamacpp", file.stem, str(file)) for file in files}


def _vllm(rig: Rig) -> Mapping[str, str]:
    fake = json.dumps({"load_seconds": FAKE_VLLM_SECONDS})
    options = f"[models.options]\nshm_gb = 0.064\nenvironment = {{ FAKE_VLLM = {json.dumps(fake)} }}\n"
    names = ("bench/model-a", "bench/model-b")
    for name in names:
        fill_cache(rig.folder / "hub", name, TINY_MODEL)
    return {name: entry + options for name, entry in _entries("vllm", *names).items()}


def _entries(engine: str, *models: str) -> Mapping[str, str]:
    return {model: _entry(engine, model, model) for model in models}


def _entry(engine: str, model: str, source: str) -> str:
    fields = {"id": model, "engine": engine, "source": source, "required_gb": MODEL_GB}
    return "[[models]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


def _docker(rig: Rig, running: ExitStack) -> dict[str, Any]:
    """Start a Docker daemon; return the console's settings for it. Raises _Unavailable."""
    if rig.short:
        raise _Unavailable("a short run leaves Docker out")
    if os.geteuid() != 0:
        raise _Unavailable("a Docker daemon needs root")
    try:
        docker = running.enter_context(docker_engine())
    except (AssertionError, OSError, DockerException) as error:
        raise _Unavailable("no Docker daemon can be started here") from error
    return {
        "environment": {"HF_HUB_OFFLINE": "1"},
        "vllm_image": FAKE_VLLM_IMAGE,
        "docker_host": docker.host,
        "hub_cache_dir": rig.folder / "hub",
        "vllm_cache_dir": rig.folder / "compiled",
    }


def _milliseconds(seconds: Iterable[float]) -> str:
    taken = list(seconds)
    return f"{1000 * median(taken):.0f}" if taken else "–"
