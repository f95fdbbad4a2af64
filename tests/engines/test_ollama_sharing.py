"""Ollama models that share one loaded runner (twins): how they are recognised, listed, loaded and unloaded.

The port's conformance suite for them runs in `test_ollama_server.py`, on the fake or a real Ollama.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.engines.ollama.api import OllamaApi
from services.engines.ollama.engine import Ollama
from services.engines.ollama.instance import EVICTED, OllamaInstance, ServerProcess
from services.engines.ollama.watch import OllamaWatch
from services.engines.port import EngineError, Exit, Model
from tests.engines.conformance import GRACE, LOAD_SECONDS
from tests.support.console import wait_until
from tests.support.ollama import FakeOllama

MODELS = {"tiny-a:latest": {"size": 7_411_936, "hold_mb": 20}, "tiny-b:latest": {"size": 46_236_961, "hold_mb": 30}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeOllama]:
    """A server with copies of `tiny-a`: `copied` (`ollama cp`), `poet` (another SYSTEM), `small` (another num_ctx)."""
    with FakeOllama(tmp_path / "ollama", models=MODELS) as fake:
        order(fake, "/api/copy", {"source": "tiny-a", "destination": "copied"})
        create(fake, "poet", system="Rhyme.\nFROM /elsewhere/sha256-" + 64 * "0")
        create(fake, "small", parameters={"num_ctx": 512})
        create(fake, "spelled-out", parameters={"num_ctx": 4096})
        yield fake


@pytest.fixture
def engine(server: FakeOllama) -> Iterator[Ollama]:
    process = ServerProcess(server.servers()[0].pid)
    engine = Ollama(OllamaWatch(server.url), local=True, process=lambda: process)
    engine.prepare()
    yield engine
    engine.close()


@pytest.fixture
def catalog(engine: Ollama) -> dict[str, Model]:
    return {model.id.removesuffix(":latest"): model for model in engine.discover()}


def test_models_with_the_same_weights_and_runner_options_share_memory(engine: Ollama, catalog: dict[str, Model]):
    """Copies and models with another SYSTEM share memory; models with another context length or other weights don't."""
    held = {name: model.held_as for name, model in catalog.items()}
    assert held["tiny-a"] is not None
    assert held["copied"] == held["poet"] == held["tiny-a"]
    assert held["small"] == f"{held['tiny-a']} num_ctx=512"
    assert held["tiny-b"] not in (None, held["tiny-a"])
    asked = engine.describe(replace(catalog["poet"], options={"context_length": 512}))
    assert asked.held_as == held["small"]


def test_a_model_without_known_details_has_no_twin(server: FakeOllama):
    """Before `prepare`, discovery doesn't wait for the models' details."""
    engine = Ollama(OllamaWatch(server.url), local=True)
    assert {model.held_as for model in engine.discover()} == {None}
    engine.close()


def test_all_names_of_a_loaded_model_are_found(engine: Ollama, server: FakeOllama, catalog: dict[str, Model]):
    """Another client loads one name: that one and its twins are found, and no other model."""
    server.load("poet")
    models = list(catalog.values())
    wait_until(lambda: len(engine.loaded(models)) == 3, "all three names to be found")
    assert {model.source for model in engine.loaded(models)} == {"tiny-a:latest", "copied:latest", "poet:latest"}
    assert server.ps() == ["poet:latest"]


def test_of_two_entries_with_different_contexts_only_one_counts_as_loaded(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """For two settings entries with the same source, the one with the loaded context length counts as loaded."""
    wanted = [
        engine.describe(replace(catalog["tiny-a"], id=f"ctx{size}", options={"context_length": size}))
        for size in (512, 256)
    ]
    instance = load(engine, wanted[1])
    assert instance.name.startswith("switchyard/")
    assert list(engine.loaded(wanted)) == [wanted[1]]
    server.unload(instance.name)
    server.load("tiny-a")
    wait_until(lambda: list(engine.loaded(wanted)) == [wanted[0]], "what fits neither to be shown by its name alone")


def test_options_equal_to_the_server_s_defaults_share_the_runner(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """The app doesn't know those defaults: the load succeeds anyway, and its exit is reported."""
    exits: list[Exit] = []
    load(engine, catalog["tiny-a"])
    assert catalog["spelled-out"].held_as != catalog["tiny-a"].held_as
    second = load(engine, catalog["spelled-out"], exits)
    assert server.ps() == ["tiny-a:latest"]
    assert second.usage() is not None
    server.unload("spelled-out")
    server.unload("tiny-a")
    wait_until(lambda: bool(exits), "the end to be told")
    assert exits == [Exit(EVICTED, released=True)]


def test_loading_with_other_options_replaces_the_first_runner(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """Ollama runs one runner for each weights file; the first model's exit counts as released, not as a failure."""
    exits: list[Exit] = []
    first = load(engine, catalog["tiny-a"], exits)
    load(engine, catalog["small"])
    wait_until(lambda: bool(exits), "the end of the first to be told")
    assert first.usage() is None
    assert exits == [Exit(EVICTED, released=True)]
    assert [model.source for model in engine.loaded(list(catalog.values()))] == ["small:latest"]
    assert server.ps() == ["small:latest"]


def test_a_twin_is_unloaded_by_the_name_that_ollama_lists(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """`stop` unloads the shared runner; a later load of the twin starts a new one."""
    load(engine, catalog["tiny-a"])
    second = load(engine, catalog["copied"])
    second.stop(GRACE)
    assert server.ps() == []
    asked = [r["body"]["model"] for r in server.requests("/api/generate") if r["body"].get("keep_alive") == 0]
    assert asked == ["tiny-a:latest"]
    load(engine, catalog["copied"])
    assert server.ps() == ["copied:latest"]


def test_a_twin_is_unloaded_after_the_listed_name_is_deleted(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """Ollama keeps the runner of a deleted name, so the remaining name is used to unload it."""
    load(engine, catalog["tiny-a"])
    second = load(engine, catalog["copied"])
    OllamaApi(server.url).delete("tiny-a")
    second.stop(GRACE)
    assert server.ps() == []


def test_after_a_failed_stop_all_twins_remain_loaded(engine: Ollama, server: FakeOllama, catalog: dict[str, Model]):
    """A later unload is reported as done by another program, not by the stop that failed."""
    exits: list[Exit] = []
    first = load(engine, catalog["tiny-a"], exits)
    second = load(engine, catalog["poet"], exits)
    server.set_fault("never_unload", True)
    with pytest.raises(EngineError, match="did not unload"):
        second.stop(0.3)
    assert first.usage() is not None
    server.clear_faults()
    wait_until(lambda: len(exits) == 2, "both ends, which came late, to be told")
    assert exits == [Exit(EVICTED, released=True)] * 2


def load(engine: Ollama, model: Model, exits: list[Exit] | None = None) -> OllamaInstance:
    instance = engine.launch(model, (exits if exits is not None else []).append)
    instance.wait_ready(lambda _: None, LOAD_SECONDS)
    return instance


def create(server: FakeOllama, name: str, **said: object) -> None:
    order(server, "/api/create", {"model": name, "from": "tiny-a", "stream": False, **said})


def order(server: FakeOllama, path: str, body: dict[str, object]) -> None:
    server.http.post(server.url + path, json=body, timeout=10).raise_for_status()
