"""The port's conformance suite on the vllm engine with the real vLLM: its CPU build, in real containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from services.downloads.huggingface.process import HubProcess
from services.downloads.huggingface.vllm_weights import VllmWeights
from services.engines.containers.docker_runtime import DockerRuntime
from services.engines.port import Endpoint, Evidence, Instance, LoadFailed, Model
from services.engines.vllm.engine import Vllm
from services.engines.vllm.spec import VllmSettings
from services.memory.ledger import Reading
from tests.engines.conformance import GRACE, EngineCase, EngineConformance
from tests.support.console import wait_until
from tests.support.docker import DockerEngine
from tests.support.real_vllm import CONTEXT_LENGTH, ENVIRONMENT, MODELS, REAL_IMAGE, SHM_GB, mounts, size_bytes

HOST = Reading("host", "System memory", "host", 16 * 10**9, 12 * 10**9)
LOAD_SECONDS = 300.0
"""Most of a load is three processes that import PyTorch, one after the other: 30 s on two cores, more where they are
busy."""
END_SECONDS = 60.0


def model(name: str) -> Model:
    """A model that is not compiled, because compilation would take most of the load time."""
    options = {
        "device": "host",
        "context_length": CONTEXT_LENGTH,
        "arguments": ["--enforce-eager"],
        "environment": ENVIRONMENT,
        "mounts": mounts(),
    }
    return Model(name, "vllm", str(MODELS / name), size_bytes=size_bytes(name), options=options)


class TestRealVllm(EngineConformance):
    """The conformance suite, and tests that need the real vLLM."""

    @pytest.fixture
    def case(self, docker: DockerEngine, tmp_path: Path) -> Iterator[EngineCase]:
        shm_bytes = SHM_GB * 10**9
        settings = VllmSettings(REAL_IMAGE, "test", tmp_path / "hub", tmp_path / "compiled", shm_bytes=shm_bytes)
        weights = VllmWeights(tmp_path / "hub", HubProcess())
        engine = Vllm(lambda: DockerRuntime(docker.host), settings, weights, readings=lambda: [HOST])
        good, other, damaged = model("tiny-a"), model("tiny-b"), model("damaged")

        def end(instance: Instance) -> None:
            docker.client.kill(_container_of(instance))

        def serves(endpoint: Endpoint) -> bool:
            try:
                return requests.get(f"{endpoint.origin}/health", timeout=5).status_code == 200
            except requests.ConnectionError:
                return False

        yield EngineCase(engine, good, other, damaged, end=end, serves=serves, load_seconds=LOAD_SECONDS)
        engine.close()
        docker.remove_containers()

    def test_every_stage_is_reported_and_shards_are_counted(self, case: EngineCase):
        """The stages are read from the real vLLM's log, which may differ from the recorded logs."""
        seen: list[Evidence] = []
        instance = case.launch()
        try:
            instance.wait_ready(seen.append, LOAD_SECONDS)
        finally:
            instance.stop(GRACE)
        assert {e.stage for e in seen} == {"loading_weights", "initializing_gpu", "warming_up"}
        assert any("of 5 shards" in (e.detail or "") for e in seen)

    def test_the_death_of_the_engine_process_is_reported(self, case: EngineCase, docker: DockerEngine):
        """vLLM then exits with code 0 some seconds later; the exit is reported as a failure with the likely reason."""
        with case.ready() as (instance, endpoint):
            _process(docker, instance, "VLLM::EngineCore").kill()
            wait_until(lambda: bool(case.exits), "the exit to be reported", END_SECONDS)
            assert not case.serves(endpoint)
        assert len(case.exits) == 1
        assert "EngineDeadError" in case.exits[0].cause
        assert "memory runs out" in case.exits[0].cause

    def test_a_missing_model_is_reported_as_the_cause(self, case: EngineCase):
        """vLLM notices a path that doesn't exist before it starts an engine."""
        instance = case.launch(model("missing"))
        with pytest.raises(LoadFailed, match="missing") as caught:
            instance.wait_ready(lambda _: None, LOAD_SECONDS)
        instance.stop(GRACE)
        assert "There is neither a folder nor a model" in str(caught.value)


def _container_of(instance: Instance) -> str:
    container_id = instance.container_id  # type: ignore[attr-defined]
    assert container_id is not None
    return str(container_id)


def _process(docker: DockerEngine, instance: Instance, name: str) -> psutil.Process:
    """The process with that name in the instance's container."""
    listed = docker.client.top(_container_of(instance), "-eo pid,comm")["Processes"]
    return next(p for p in (psutil.Process(int(pid)) for pid, *_ in listed) if p.name() == name)
