"""A restart of the app and the llama.cpp processes that the run before left: taken over, given time, or ended."""

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
    """Two models of their own."""
    models = tmp_path / "models"
    models.mkdir()
    for name in ("good", "other"):
        shutil.copy(DEMO_MODELS / "switchyard-mini.gguf", models / f"{name}.gguf")
    return models


@pytest.fixture
def make_engine(folder: Path) -> Iterator[MakeEngine]:
    """Engines as runs of the app, one after the other, would make them, with their catalogue described."""
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
    """The good model, loaded by a run of the app that is gone."""
    engine = make_engine()
    instance = engine.launch(catalog(engine)["good"], lambda _: None)
    endpoint = instance.wait_ready(lambda _: None, 30)
    instance.warm_up(30)
    return instance, endpoint


def catalog(engine: LlamaCpp) -> dict[str, Model]:
    return {model.id: model for model in engine.discover()}


def test_what_answers_is_taken_over(make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint]):
    """Once; it serves on under the same address, and its end is noticed."""
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


def test_what_is_slow_to_answer_is_left_alone_and_asked_again(
    make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint], monkeypatch: pytest.MonkeyPatch
):
    """A busy engine isn't killed for two seconds of silence: it goes on being named, and is taken over in time."""
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


def test_what_stays_silent_is_ended(
    make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint], monkeypatch: pytest.MonkeyPatch
):
    """After a minute nobody expects an answer, and its memory can't be had otherwise."""
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


def test_what_has_ended_is_not_waited_for(make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint]):
    """Between the look and the question."""
    engine = make_engine()
    good = catalog(engine)["good"]
    assert list(engine.loaded([good])) == [good]
    os.killpg(left[0].pid, signal.SIGKILL)
    _wait_gone(left[0].pid)
    assert engine.adopt(good, lambda _: None) is None
    assert list(engine.loaded([good])) == []


@pytest.mark.parametrize("how", ["load", "close"])
def test_what_is_silent_does_not_stay_when_nobody_will_ask_again(
    make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint], how: str
):
    """The model is loaded anew, for which there would be no room, or the app goes."""
    engine = make_engine()
    good = catalog(engine)["good"]
    assert list(engine.loaded([good])) == [good]
    os.killpg(left[0].pid, signal.SIGSTOP)
    if how == "load":
        engine.launch(good, lambda _: None).stop(5)
    else:
        engine.close()
    _wait_gone(left[0].pid)


def test_what_nobody_would_load_like_that_is_ended(make_engine: MakeEngine, left: tuple[LlamaCppInstance, Endpoint]):
    """Another run with another catalogue: nobody could reach it."""
    engine = make_engine()
    assert list(engine.loaded([catalog(engine)["other"]])) == []
    _wait_gone(left[0].pid)


@pytest.mark.usefixtures("left")
def test_asking_what_is_loaded_reads_nothing(make_engine: MakeEngine, folder: Path):
    """It is called every second by who must never wait: a disk that hangs is not its business."""
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
