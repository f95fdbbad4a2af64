"""The llama.cpp processes that a previous run of the app left are adopted, given time to answer, or ended."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from services.engines.llamacpp.engine import LlamaCpp
from services.engines.llamacpp.folder import ModelFolder
from services.engines.llamacpp.instance import LlamaCppInstance
from services.engines.port import Endpoint, Exit, Model, NotResponding
from services.engines.processes import ProcessRegistry
from tests.support.console import DEMO_MODELS, FAKE_LLAMA_SERVER, wait_until

MakeEngine = Callable[[], LlamaCpp]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with two models."""
    models = tmp_path / "models"
    models.mkdir()
    for name in ("good", "other"):
        shutil.copy(DEMO_MODELS / "switchyard-mini.gguf", models / f"{name}.gguf")
    return models


@pytest.fixture
def make_engine(folder: Path) -> Iterator[MakeEngine]:
    """Make engines as successive runs of the app would, with their catalogue loaded."""
    registry = ProcessRegistry(folder.parent / "state")

    def make() -> LlamaCpp:
        engine = LlamaCpp(
            ModelFolder(folder),
            registry,
            context_length=512,
            parallel=1,
            native_server=str(FAKE_LLAMA_SERVER),
            standby=False,
        )
        engine.discover()
        engine.prepare()
        return engine

    yield make
    for record in registry.engines():
        os.killpg(record.pid, signal.SIGKILL)


@pytest.fixture
def left(make_engine: MakeEngine) -> tuple[LlamaCppInstance, Endpoint]:
    """The good model, left loaded by a previous run of the app."""
    engine = make_engine()
    instance = engine.launch(catalog(engine)["good"], lambda _: None)
    endpoint = instance.wait_ready(lambda _: None, 30)
    instance.warm_up(30)
    return instance, endpoint


def catalog(engine: LlamaCpp) -> dict[str, Model]:
    return {model.id: model for model in engine.discover()}


def test_a_process_that_answers_is_adopted(make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint]):
    """It is adopted only once, keeps its address, and its exit is reported."""
    engine = make_engine()
    good = catalog(engine)["good"]
    assert list(engine.loaded([good])) == [good]
    exits: list[Exit] = []
    adopted = engine.adopt(good, exits.append)
    assert adopted is not None
    assert adopted.wait_ready(lambda _: None, 0) == left[1]
    assert adopted.pid == left[0].pid
    assert list(engine.loaded([good])) == []
    assert engine.adopt(good, exits.append) is None
    os.killpg(adopted.pid, signal.SIGKILL)
    wait_until(lambda: len(exits) == 1, "its end to be told")


def test_a_slow_process_is_left_running_and_adopted_later(
    make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint], monkeypatch: pytest.MonkeyPatch
):
    """A busy engine isn't killed for a short silence: it stays listed as loaded, and is adopted once it answers."""
    monkeypatch.setattr("services.engines.llamacpp.engine.ADOPT_SECONDS", 0.2)
    engine = make_engine()
    good = catalog(engine)["good"]
    os.killpg(left[0].pid, signal.SIGSTOP)
    for _ in range(2):
        assert list(engine.loaded([good])) == [good]
        with pytest.raises(NotResponding, match="does not answer yet"):
            engine.adopt(good, lambda _: None)
    assert psutil.pid_exists(left[0].pid)
    os.killpg(left[0].pid, signal.SIGCONT)
    wait_until(lambda: _answers(left[1]), "it to answer")
    monkeypatch.setattr("services.engines.llamacpp.engine.ADOPT_SECONDS", 10.0)
    adopted = engine.adopt(good, lambda _: None)
    assert adopted is not None
    assert adopted.wait_ready(lambda _: None, 0) == left[1]


def test_a_process_that_stays_silent_is_ended(
    make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint], monkeypatch: pytest.MonkeyPatch
):
    """After `ADOPT_TIMEOUT` without an answer the process is killed, which frees its memory."""
    monkeypatch.setattr("services.engines.llamacpp.engine.ADOPT_SECONDS", 0.2)
    engine = make_engine()
    good = catalog(engine)["good"]
    os.killpg(left[0].pid, signal.SIGSTOP)
    assert list(engine.loaded([good])) == [good]
    with pytest.raises(NotResponding):
        engine.adopt(good, lambda _: None)
    monkeypatch.setattr("services.engines.llamacpp.engine.ADOPT_TIMEOUT", 0.0)
    assert engine.adopt(good, lambda _: None) is None
    assert list(engine.loaded([good])) == []
    _wait_gone(left[0].pid)


def test_a_process_that_has_ended_is_not_waited_for(make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint]):
    """The process ends after `loaded` listed the model and before `adopt` is called."""
    engine = make_engine()
    good = catalog(engine)["good"]
    assert list(engine.loaded([good])) == [good]
    os.killpg(left[0].pid, signal.SIGKILL)
    _wait_gone(left[0].pid)
    assert engine.adopt(good, lambda _: None) is None
    assert list(engine.loaded([good])) == []


@pytest.mark.parametrize("how", ["load", "close"])
def test_a_silent_process_is_ended_when_its_model_is_loaded_again_or_the_app_closes(
    make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint], how: str
):
    """Otherwise it would keep memory that the new load may need, or outlive the app."""
    engine = make_engine()
    good = catalog(engine)["good"]
    assert list(engine.loaded([good])) == [good]
    os.killpg(left[0].pid, signal.SIGSTOP)
    if how == "load":
        engine.launch(good, lambda _: None).stop(5)
    else:
        engine.close()
    _wait_gone(left[0].pid)


def test_a_process_whose_model_is_not_in_the_catalogue_is_ended(
    make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint]
):
    """A run with another catalogue could not use the process."""
    engine = make_engine()
    assert list(engine.loaded([catalog(engine)["other"]])) == []
    _wait_gone(left[0].pid)


@pytest.mark.usefixtures("left")
def test_listing_loaded_models_does_not_read_the_disk(make_engine: MakeEngine, folder: Path):
    """`loaded` is called every second by callers that must not block, so a hanging disk must not delay it."""
    engine = make_engine()
    good = catalog(engine)["good"]
    shutil.move(folder, folder.with_name("elsewhere"))
    shutil.move(folder.parent / "state", folder.parent / "away")
    assert list(engine.loaded([good])) == [good]
    shutil.move(folder.parent / "away", folder.parent / "state")


def _answers(endpoint: Endpoint) -> bool:
    return requests.get(f"{endpoint.origin}/health", timeout=10).status_code == 200


def _wait_gone(pid: int) -> None:
    def gone() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(gone, "the process to be gone")
