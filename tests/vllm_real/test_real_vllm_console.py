"""Switches between two models on the real vLLM, through the console's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.console import Console
from tests.support.docker import DockerEngine
from tests.support.real_vllm import (
    CACHE_GIB,
    CONTEXT_LENGTH,
    ENVIRONMENT,
    MODELS,
    REAL_IMAGE,
    SHM_GB,
    mounts,
    size_bytes,
)

COMPILED, EAGER, DAMAGED = "tiny-a", "tiny-b", "damaged"
NEEDS_GB, BUDGET_GB = 4, 6
"""One measures about 3 GB; the budget has room for one."""
TOKENS = 400
"""Enough for a second: a token takes a few milliseconds, so that those of one busy moment come in one piece."""
THERE, OVER, FAILED, BACK = "there", "over", "failed", "back"

Events = list[tuple[str, dict[str, Any]]]


def entry(model: str, *arguments: str, required_gb: float = NEEDS_GB) -> str:
    options = {
        "image": REAL_IMAGE,
        "device": "host",
        "context_length": CONTEXT_LENGTH,
        "shm_gb": SHM_GB,
        "arguments": list(arguments),
        "mounts": mounts(),
    }
    lines = [
        "[[models]]",
        f'id = "{model}"',
        'engine = "vllm"',
        f"source = {json.dumps(str(MODELS / model))}",
        f"size_gb = {size_bytes(model) / 1e9}",
        f"required_gb = {required_gb}",
        "[models.options]",
        *(f"{name} = {json.dumps(value)}" for name, value in options.items()),
        f"environment = {{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in ENVIRONMENT.items())} }}",
    ]
    return "\n".join([*lines, ""])


LISTED = entry(COMPILED) + entry(EAGER, "--enforce-eager") + entry(DAMAGED, "--enforce-eager", required_gb=1)


@dataclass
class Story:
    """What was observed from the first switch to the last stop, such as the events of each switch and the containers
    (their ids by model) that ran after each step."""

    switches: dict[str, Events] = field(default_factory=dict)
    running: dict[str, dict[str, str]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    chat_pieces: list[bytes] = field(default_factory=list)
    answer_after_restart: str = ""

    def phases(self, switch: str) -> list[str]:
        """The stages of the switch's load, each once, in the order in which they were reported."""
        return list(dict.fromkeys(data["phase"] for _, data in self.switches[switch] if "phase" in data))


@pytest.fixture(scope="module")
def story(docker: DockerEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """One console and one sequence of switches for all tests, because each load takes half a minute or more.

    The steps: load the compiled model, switch to the other one, a failing switch, a crash of the app, switch back.
    """
    folder = tmp_path_factory.mktemp("console")
    console = Console(
        folder,
        toml=LISTED,
        memory_budget_gb=BUDGET_GB,
        docker_host=docker.host,
        hub_cache_dir=folder / "hub",
        vllm_cache_dir=folder / "compiled",
    )
    with closing(console):
        console.start()
        yield _tell(console, docker)
    docker.remove_containers()


def _tell(console: Console, docker: DockerEngine) -> Story:
    story = Story()

    def note(step: str) -> None:
        story.running[step] = {c["Labels"]["switchyard.model"]: c["Id"] for c in docker.client.containers()}

    def switch(step: str, model: str) -> None:
        story.switches[step] = list(console.switch_stream(model))
        note(step)

    switch(THERE, COMPILED)
    found = console.wait_for(lambda s: s["models"][COMPILED]["memory_basis"] == "measured", "its memory to be measured")
    story.measured = found["models"][COMPILED]
    story.chat_pieces = _streamed(console, COMPILED)
    switch(OVER, EAGER)
    switch(FAILED, DAMAGED)
    console.kill()
    console.start()
    console.wait_for(lambda s: s["models"][EAGER]["status"] == "running", "the model to be found again")
    note("restarted")
    answer = console.ask("Hello", model=EAGER, max_tokens=8)
    story.answer_after_restart = answer.json()["choices"][0]["message"]["content"]
    switch(BACK, COMPILED)
    console.post(f"/v1/models/{COMPILED}/stop")
    note("stopped")
    return story


def _streamed(console: Console, model: str) -> list[bytes]:
    """A streamed answer, in the pieces in which it arrived."""
    hello = [{"role": "user", "content": "Hello"}]
    question = {"model": model, "messages": hello, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    with closing(console.post("/v1/chat/completions", question, stream=True)) as answer:
        return list(answer.iter_content(None))


@pytest.mark.parametrize("switch", [THERE, OVER, BACK])
def test_progress_never_decreases(story, switch):
    """Progress is reported from the request until the model is ready."""
    name, _ = story.switches[switch][-1]
    assert name == "complete"
    progress = [data["progress"] for _, data in story.switches[switch] if "progress" in data]
    assert len(progress) > 5
    assert progress == sorted(progress)


@pytest.mark.parametrize("switch", [THERE, OVER, BACK])
def test_the_stages_are_reported_in_order(story, switch):
    """The stages are the same with and without compilation, and with a cold or a warm compilation cache."""
    assert story.phases(switch) == ["loading_weights", "initializing_gpu", "warming_up"]


def test_shards_and_the_compilation_are_reported(story):
    """These details are shown to users during a load."""
    told = [data["detail"] for _, data in story.switches[THERE] if data.get("detail")]
    assert "5 of 5 shards" in told
    assert "compiling for this CPU" in told


def test_where_only_one_model_fits_each_switch_unloads_the_other(story):
    """The ledger decides by the measured memory; the old container has ended when the new model is ready."""
    assert set(story.running[THERE]) == {COMPILED}
    assert set(story.running[OVER]) == {EAGER}
    assert set(story.running[BACK]) == {COMPILED}
    assert story.switches[OVER][-1][1]["unloaded_models"] == [COMPILED]
    assert story.switches[BACK][-1][1]["unloaded_models"] == [EAGER]


def test_a_stopped_container_is_reused(story):
    """The container was stopped, not removed, and the model's settings entry has not changed."""
    assert story.running[BACK] == story.running[THERE]


def test_the_memory_of_a_loaded_model_is_measured(story):
    """The measured memory includes three processes with PyTorch, the weights and the cache."""
    assert CACHE_GIB < story.measured["gpu_memory_used_gb"] < NEEDS_GB


def test_a_chat_is_streamed(story):
    """The answer arrives in many pieces and is complete."""
    assert len(story.chat_pieces) > 5
    lines = b"".join(story.chat_pieces).decode().split("\n\n")
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    choices = [choice for chunk in data[:-1] for choice in json.loads(chunk)["choices"]]
    assert len([choice for choice in choices if choice["delta"].get("content")]) > 5
    assert choices[-1]["finish_reason"] == "length"


def test_a_damaged_shard_is_named_as_the_cause_and_the_other_model_keeps_running(story):
    """The message is the first cause among a hundred lines of tracebacks; the other model was not unloaded."""
    name, data = story.switches[FAILED][-1]
    assert name == "error"
    assert "SafetensorError" in data["message"]
    assert "damaged or incomplete" in data["message"]
    assert story.running[FAILED] == story.running[OVER]


def test_a_model_survives_a_crash_of_the_app(story):
    """The same container is found by its label, without a new load, and the model answers."""
    assert story.running["restarted"] == story.running[OVER]
    assert story.answer_after_restart


def test_stopping_the_last_model_leaves_no_container_running(story):
    """The last step stops the last running model."""
    assert story.running["stopped"] == {}
