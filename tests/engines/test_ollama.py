"""The ollama engine on a server that other clients use too and that fails on demand: the fake.

The port's conformance suite runs in `test_ollama_server.py`, on the fake or a real Ollama.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from services.engines.ollama.api import OllamaApi, OllamaUnreachable
from services.engines.ollama.engine import Ollama
from services.engines.ollama.instance import EVICTED, ServerProcess
from services.engines.ollama.names import full_name
from services.engines.ollama.watch import OllamaWatch
from services.engines.port import Endpoint, EngineError, Evidence, Exit, LoadFailed, Model
from tests.engines.conformance import GRACE, LOAD_SECONDS, EngineCase
from tests.support.console import free_port, wait_until
from tests.support.ollama import FakeOllama

MODELS = {
    "tiny-a:latest": {"size": 7_411_936, "hold_mb": 20},
    "tiny-b:latest": {"size": 46_236_961, "hold_mb": 30},
    "broken:latest": {"size": 7_411_936, "broken": True},
    "embedder:latest": {"size": 7_411_936, "embedding_only": True},
    "spilled:latest": {"size": 10_000_000, "vram_share": 0.6},
    "cloudy:latest": {"size": 400, "cloud": True},
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeOllama]:
    """A server that another program started."""
    with FakeOllama(tmp_path / "ollama", models=MODELS) as fake:
        yield fake


@pytest.fixture
def make_engine(server: FakeOllama) -> Iterator[Callable[..., Ollama]]:
    """Make engines that watch that server."""
    made: list[Ollama] = []

    def make(**options: object) -> Ollama:
        process = ServerProcess(server.servers()[0].pid, bool(options.pop("ours", False)))
        engine = Ollama(OllamaWatch(server.url), local=True, process=lambda: process, **options)  # type: ignore[arg-type]
        engine.prepare()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


class TestShared:
    """One engine on a server that other clients use too."""

    @pytest.fixture
    def case(self, server: FakeOllama, make_engine: Callable[..., Ollama]) -> EngineCase:
        engine = make_engine()
        good, other, damaged = (model(name) for name in ("tiny-a", "tiny-b", "broken"))

        def serves(endpoint: Endpoint) -> bool:
            return endpoint.model in server.ps()

        return EngineCase(engine, good, other, damaged, end=lambda _: server.unload("tiny-a"), serves=serves)

    def test_an_unload_by_another_client_counts_as_released_not_failed(self, case: EngineCase, server: FakeOllama):
        """The exit's cause says that another program unloaded the model."""
        with case.ready():
            server.unload("tiny-a")
            wait_until(lambda: bool(case.exits), "the exit to be reported")
        assert case.exits == [Exit(EVICTED, released=True)]

    def test_the_end_of_the_server_ends_its_models(self, case: EngineCase, server: FakeOllama):
        """The exit is reported within seconds, once for each model."""
        with case.ready():
            server.kill()
            wait_until(lambda: bool(case.exits), "the exit to be reported", timeout=5)
        assert len(case.exits) == 1

    def test_loads_carry_no_options_and_a_numeric_keep_alive(self, case: EngineCase, server: FakeOllama):
        """With options that differ from a chat's, the chat would reload the model; the string "-1" is an error."""
        with case.ready() as (_, endpoint):
            _chat(endpoint)
        asked = [r["body"] for r in server.requests() if r["path"] == "/api/generate"]
        assert asked[0] == {"model": "tiny-a:latest", "keep_alive": -1, "stream": False}
        assert asked[-1]["keep_alive"] == 0
        assert server.output().count("runner started in") == 1

    def test_stop_frees_the_memory_of_the_model(self, case: EngineCase):
        """The model's process has ended when `stop` returns."""
        with case.ready() as (instance, _):
            runner = instance.pid
            assert runner is not None
            instance.stop(GRACE)
            assert not _alive(runner)

    def test_load_progress_follows_the_memory_of_the_runner(self, case: EngineCase, server: FakeOllama):
        """Ollama's API reports no progress during a load, so the fractions come from the runner's memory."""
        server.set_fault("slow_load", 1.0)
        seen: list[Evidence] = []
        instance = case.launch(case.other)
        try:
            instance.wait_ready(seen.append, LOAD_SECONDS)
        finally:
            instance.stop(GRACE)
        fractions = [e.fraction for e in seen if e.stage == "loading_weights" and e.fraction is not None]
        assert len(fractions) >= 3
        assert fractions == sorted(fractions)

    def test_stopping_a_load_cancels_the_request(self, case: EngineCase, server: FakeOllama):
        """Ollama aborts the load when its client disconnects; nothing stays loaded."""
        server.set_fault("stuck_load", True)
        instance = case.launch()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(instance.wait_ready, lambda _: None, LOAD_SECONDS)
            wait_until(lambda: bool(server.runners()), "the load to begin")
            instance.stop(GRACE)
            assert isinstance(waiting.exception(GRACE), LoadFailed)
        assert server.ps() == []
        assert case.exits == []

    def test_a_failed_load_reports_the_first_cause(self, case: EngineCase):
        """The error has Ollama's explanation without its panic."""
        instance = case.launch(case.damaged)
        with pytest.raises(LoadFailed, match="missing tensor") as caught:
            instance.wait_ready(lambda _: None, LOAD_SECONDS)
        assert "panic" not in str(caught.value)
        instance.stop(GRACE)

    def test_a_runner_killed_during_a_load_is_explained(self, case: EngineCase, server: FakeOllama):
        """Ollama's `signal: killed` is replaced by a message that names SIGKILL, and the kernel if it sent it."""
        server.set_fault("slow_load", 60.0)
        instance = case.launch()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(instance.wait_ready, lambda _: None, LOAD_SECONDS)
            wait_until(lambda: bool(server.runners()), "the load to begin")
            server.runners()[0].kill()
            failure = waiting.exception(LOAD_SECONDS)
        assert isinstance(failure, LoadFailed)
        assert "was ended by SIGKILL" in str(failure) or "was ended by the kernel (SIGKILL)" in str(failure)
        instance.stop(GRACE)

    def test_an_embedding_model_is_loaded_by_an_embedding(self, case: EngineCase, server: FakeOllama):
        """Such a model answers /api/generate with 400; an embedding request loads it and warms it up."""
        with case.ready(model("embedder")) as (_, endpoint):
            assert endpoint.model in server.ps()

    def test_a_model_that_does_not_unload_stays_in_use(self, case: EngineCase, server: FakeOllama):
        """On a server of another program nothing is forced: `stop` raises, and the model still serves."""
        with case.ready() as (instance, endpoint):
            server.set_fault("never_unload", True)
            with pytest.raises(EngineError, match="did not unload"):
                instance.stop(0.5)
            assert case.serves(endpoint)
            server.clear_faults()
            wait_until(lambda: bool(case.exits), "its end, which came late, to be noticed")

    def test_a_model_that_does_not_unload_is_killed_on_the_app_s_own_server(
        self, server: FakeOllama, make_engine: Callable[..., Ollama]
    ):
        """The model's runner is killed, which frees its memory."""
        engine = make_engine(ours=True)
        instance = engine.launch(engine.describe(model("tiny-a")), lambda _: None)
        instance.wait_ready(lambda _: None, LOAD_SECONDS)
        runner = instance.pid
        assert runner is not None
        server.set_fault("never_unload", True)
        instance.stop(0.5)
        assert not _alive(runner)

    def test_a_model_loaded_by_another_client_is_found_and_adopted(self, case: EngineCase, server: FakeOllama):
        """The adopted model is ready at once, answers, and can be stopped."""
        server.load("tiny-b")
        assert case.other is not None
        other = case.other
        wait_until(lambda: other in case.engine.loaded([other]), "the look that finds it")
        adopted = case.engine.adopt(case.engine.describe(case.other), case.exits.append)
        assert adopted is not None
        endpoint = adopted.wait_ready(lambda _: None, 0)
        _chat(endpoint)
        adopted.stop(GRACE)
        assert server.ps() == []
        assert case.exits == []

    def test_a_changed_expiry_causes_a_warning(self, case: EngineCase, server: FakeOllama):
        """Another client's keep_alive replaces the app's; the warning says when the model will be unloaded."""
        with case.ready() as (instance, _):
            assert instance.warning() is None
            server.load("tiny-a", keep_alive=600)
            wait_until(lambda: instance.warning() is not None, "the warning")
            assert "Another program set it to be unloaded at" in str(instance.warning())

    def test_a_model_only_partly_on_the_gpu_causes_a_warning(self, make_engine: Callable[..., Ollama]):
        """When `size_vram` is below `size`, the warning names the share on the GPU, and the usage counts both parts."""
        engine = make_engine(gpus=lambda: ["GPU-1"])
        instance = engine.launch(engine.describe(model("spilled")), lambda _: None)
        instance.wait_ready(lambda _: None, LOAD_SECONDS)
        instance.warm_up(LOAD_SECONDS)
        usage = instance.usage()
        assert usage is not None
        assert (usage.device, usage.bytes > usage.spilled_bytes > 0) == ("GPU-1", True)
        assert "Only 59 % of it fit on the GPU" in str(instance.warning()) or "Only 60 %" in str(instance.warning())
        instance.stop(GRACE)

    def test_a_configured_context_length_is_served_under_a_derived_name(
        self, server: FakeOllama, make_engine: Callable[..., Ollama]
    ):
        """`/v1` takes no context length, so a derived model has it; the catalogue doesn't list that one."""
        engine = make_engine()
        wanted = engine.describe(replace(model("tiny-a"), options={"context_length": 512}))
        instance = engine.launch(wanted, lambda _: None)
        endpoint = instance.wait_ready(lambda _: None, LOAD_SECONDS)
        instance.warm_up(LOAD_SECONDS)
        assert str(endpoint.model).startswith("switchyard/")
        assert list(engine.loaded([wanted])) == [wanted]
        assert not any(m.id.startswith("switchyard/") for m in engine.discover())
        (loaded,) = OllamaApi(server.url).running()
        assert loaded.context_length == 512
        instance.stop(GRACE)

    def test_removing_a_model_deletes_its_files(self, case: EngineCase, server: FakeOllama):
        """The models derived from it are deleted too."""
        case.engine.remove(case.engine.describe(case.good), ())
        assert "tiny-a:latest" not in server.tags()
        assert "tiny-a:latest" not in [m.id for m in case.engine.discover()]


def test_only_models_of_this_machine_are_discovered(make_engine: Callable[..., Ollama]):
    """Cloud models take no local memory and can't be switched to; a name without its tag is an alias."""
    found = {m.id: m for m in make_engine().discover()}
    assert "cloudy:latest" not in found
    assert found["tiny-a:latest"].aliases == ("tiny-a",)
    assert found["tiny-a:latest"].size_bytes == 7_411_936


def test_an_unreachable_server_gives_a_helpful_error():
    """The message says what to do; discovery finds no models."""
    engine = Ollama(OllamaWatch(f"http://127.0.0.1:{free_port()}"), local=True)
    assert engine.discover() == []
    with pytest.raises(OllamaUnreachable, match="Start it on the Models page"):
        engine.launch(model("tiny-a"), lambda _: None)


def test_models_of_a_remote_server_take_no_local_memory(server: FakeOllama):
    """The estimate is 0 bytes, and no usage is measured."""
    engine = Ollama(OllamaWatch(server.url), local=False)
    described = engine.describe(model("tiny-a"))
    assert engine.estimate(described).bytes == 0
    instance = engine.launch(described, lambda _: None)
    instance.wait_ready(lambda _: None, LOAD_SECONDS)
    assert instance.usage() is None
    instance.stop(GRACE)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("llama3.2", "llama3.2:latest"),
        ("q:7b", "q:7b"),
        ("127.0.0.1:5005/library/x", "127.0.0.1:5005/library/x:latest"),
    ],
)
def test_a_name_without_a_tag_gets_the_tag_latest(name, full):
    """The colon before a port doesn't begin a tag."""
    assert full_name(name) == full


def model(name: str) -> Model:
    return Model(full_name(name), "ollama", full_name(name))


def _chat(endpoint: Endpoint) -> None:
    question = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    answer = requests.post(f"{endpoint.origin}/v1/chat/completions", json=question, timeout=30)
    assert answer.json()["choices"][0]["message"]["content"]


def _alive(pid: int) -> bool:
    return (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    )
