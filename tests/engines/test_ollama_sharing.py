"""Names of one Ollama that are one in its memory: which they are, how they are listed, loaded and unloaded.

The promises of the port about them run in `test_ollama_server.py`, on the fake or a real Ollama.
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


def test_what_lies_in_memory_is_the_weights_and_the_runner_options(engine: Ollama, catalog: dict[str, Model]):
    """A copy and another SYSTEM are the same; another context or other weights are not."""
    held = {name: model.held_as for name, model in catalog.items()}
    assert held["tiny-a"] is not None
    assert held["copied"] == held["poet"] == held["tiny-a"]
    assert held["small"] == f"{held['tiny-a']} num_ctx=512"
    assert held["tiny-b"] not in (None, held["tiny-a"])
    asked = engine.describe(replace(catalog["poet"], options={"context_length": 512}))
    assert asked.held_as == held["small"]


def test_what_is_not_known_yet_is_nobodys_twin(server: FakeOllama):
    """Before the app serves, nobody is kept waiting for details."""
    engine = Ollama(OllamaWatch(server.url), local=True)
    assert {model.held_as for model in engine.discover()} == {None}
    engine.close()


def test_every_name_of_what_is_loaded_is_found(engine: Ollama, server: FakeOllama, catalog: dict[str, Model]):
    """By whichever name another client had it loaded, and no other."""
    server.load("poet")
    models = list(catalog.values())
    wait_until(lambda: len(engine.loaded(models)) == 3, "all three names to be found")
    assert {model.source for model in engine.loaded(models)} == {"tiny-a:latest", "copied:latest", "poet:latest"}
    assert server.ps() == ["poet:latest"]


def test_one_model_listed_twice_with_other_contexts_is_loaded_once(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """Two entries of the settings with one source: the one whose context it has, not both."""
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


def test_options_that_come_to_the_servers_defaults_are_no_other_runner(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """Nobody knows those defaults: the load succeeds all the same, and its end is noticed."""
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


def test_loading_with_other_options_takes_the_runner_of_the_first(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """One file of weights, one runner: the first is released, nothing is broken."""
    exits: list[Exit] = []
    first = load(engine, catalog["tiny-a"], exits)
    load(engine, catalog["small"])
    wait_until(lambda: bool(exits), "the end of the first to be told")
    assert first.usage() is None
    assert exits == [Exit(EVICTED, released=True)]
    assert [model.source for model in engine.loaded(list(catalog.values()))] == ["small:latest"]
    assert server.ps() == ["small:latest"]


def test_it_is_unloaded_by_the_name_that_is_listed(engine: Ollama, server: FakeOllama, catalog: dict[str, Model]):
    """And gone when no name of it is listed any more; a later load of a twin begins anew."""
    load(engine, catalog["tiny-a"])
    second = load(engine, catalog["copied"])
    second.stop(GRACE)
    assert server.ps() == []
    asked = [r["body"]["model"] for r in server.requests("/api/generate") if r["body"].get("keep_alive") == 0]
    assert asked == ["tiny-a:latest"]
    load(engine, catalog["copied"])
    assert server.ps() == ["copied:latest"]


def test_a_twin_is_unloaded_though_the_listed_name_is_deleted(
    engine: Ollama, server: FakeOllama, catalog: dict[str, Model]
):
    """Ollama keeps the runner of a name that is gone: the one that is left has to do."""
    load(engine, catalog["tiny-a"])
    second = load(engine, catalog["copied"])
    OllamaApi(server.url).delete("tiny-a")
    second.stop(GRACE)
    assert server.ps() == []


def test_what_will_not_go_goes_on_under_all_its_names(engine: Ollama, server: FakeOllama, catalog: dict[str, Model]):
    """A stop that failed is no reason: who is unloaded by somebody else later says that."""
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
