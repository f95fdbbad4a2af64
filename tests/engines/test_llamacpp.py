"""The port's conformance suite on the llamacpp engine: embedded, and with a native server (a fake)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import requests

from services.engines.llamacpp.engine import LlamaCpp, id_of
from services.engines.llamacpp.folder import ModelFolder
from services.engines.llamacpp.instance import first_cause
from services.engines.port import Endpoint, Instance, Model
from services.engines.processes import ProcessRegistry
from tests.engines.conformance import EngineCase, EngineConformance
from tests.support.console import DEMO_MODELS, FAKE_LLAMA_SERVER, wait_until


def make_case(folder: Path, native_server: str | None = None) -> EngineCase:
    damaged = folder / "damaged.gguf"
    damaged.write_bytes((DEMO_MODELS / "switchyard-mini.gguf").read_bytes()[:200_000])
    engine = LlamaCpp(
        ModelFolder(DEMO_MODELS),
        ProcessRegistry(folder / "state"),
        context_length=2048,
        parallel=2,
        native_server=native_server,
        standby=native_server is None,
    )
    good = Model("org/good:1", "llamacpp", str(DEMO_MODELS / "switchyard-mini.gguf"))
    other = Model("other", "llamacpp", str(DEMO_MODELS / "switchyard-mini.gguf"))
    return EngineCase(engine, good, other, Model("damaged", "llamacpp", str(damaged)), end=_kill, serves=_answers)


class TestEmbedded(EngineConformance):
    """The real engine: xllamacpp in a child process, with a standby process."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> Iterator[EngineCase]:
        case = make_case(tmp_path)
        yield case
        case.engine.close()

    def test_an_engine_refuses_requests_without_its_key(self, case: EngineCase):
        """A web page or another user of this machine can reach the port, but gets 401."""
        with case.ready() as (_, endpoint):
            answer = requests.post(f"{endpoint.origin}/v1/completions", json={"prompt": "x"}, timeout=5)
            assert answer.status_code == 401

    def test_the_key_appears_in_no_process_list_and_no_log(self, case: EngineCase):
        """The key is neither in the arguments nor in the environment nor in the engine's log."""
        with case.ready() as (instance, endpoint):
            key = endpoint.headers["Authorization"].removeprefix("Bearer ")
            process = psutil.Process(instance.pid)
            assert key not in " ".join(process.cmdline())
            assert key not in str(process.environ())
            assert key not in instance.log_tail()

    def test_the_exit_of_a_killed_engine_names_the_signal(self, case: EngineCase):
        """The exit counts as a failure, not as an unload by another client."""
        with case.ready() as (instance, _):
            _kill(instance)
            wait_until(lambda: bool(case.exits), "the exit to be reported")
        assert "SIGKILL" in case.exits[0].cause
        assert not case.exits[0].released

    def test_the_standby_process_is_used_and_replaced(self, case: EngineCase):
        """The next load runs in the prepared process; then another one is started."""
        case.engine.prepare()
        wait_until(lambda: len(_children()) == 1, "a process to stand by")  # the command line is only set after exec
        (standing_by,) = _children()
        with case.ready() as (instance, _):
            assert instance.pid == standing_by
            wait_until(lambda: len(_children()) == 2, "another process to stand by")

    def test_close_ends_the_standby_process(self, case: EngineCase):
        """No process is left when the app ends."""
        case.engine.prepare()
        case.engine.close()
        assert _children() == []


class TestNative(EngineConformance):
    """A configured `llama-server`: a fake that has to pass the same tests as the embedded engine."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> Iterator[EngineCase]:
        case = make_case(tmp_path, str(FAKE_LLAMA_SERVER))
        yield case
        case.engine.close()


def test_options_that_affect_a_load_change_the_settings_key(tmp_path):
    """Measurements of loads with another context length are kept apart."""
    case = make_case(tmp_path)
    other = replace(case.good, options={"context_length": 512})
    assert case.engine.settings_key(case.good) != case.engine.settings_key(other)


@pytest.mark.parametrize(
    ("file", "model_id"),
    [
        ("tiny.gguf", "tiny"),
        ("sub/Qwen2.5-7B.Q4_K_M.gguf", "sub/Qwen2.5-7B.Q4_K_M"),
        ("big-00001-of-00003.gguf", "big"),
        ("--model; rm -rf (1).gguf", "model-rm--rf-1"),
        ("模型.gguf", "模型"),
        ("модель Q4 (копия).gguf", "модель-Q4-копия"),
        ("हिन्दी.gguf", "हिन्दी"),
        ("e\u0301te\u0301.gguf", "\xe9t\xe9"),
        ("\u202egnp.exe\udcff!.gguf", "gnp.exe"),
        ("🚂.gguf", "model"),
    ],
)
def test_a_file_name_becomes_a_safe_id(file, model_id):
    """The id has no leading dash, no space and nothing special to a shell, path or URL; letters of any script stay."""
    assert id_of(Path(file)) == model_id


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "0.00.003.540 E llama_model_load: error loading model: llama_model_loader: failed to load model from x\n"
            "0.00.003.558 E llama_model_load_from_file_impl: failed to load model",
            "llama_model_loader: failed to load model from x",
        ),
        ("ggml_aligned_malloc: failed to allocate 99 bytes", "failed to allocate 99 bytes"),
    ],
)
def test_the_first_cause_in_a_log_is_reported(log, words):
    """llama.cpp logs several errors when a load fails; the first one explains it."""
    cause = first_cause(log)
    assert cause is not None
    assert words in cause


def test_a_log_without_errors_has_no_cause():
    """The exit report then says how the process ended."""
    assert first_cause("load: all is well") is None


def _kill(instance: Instance) -> None:
    assert instance.pid is not None
    os.kill(instance.pid, signal.SIGKILL)


def _answers(endpoint: Endpoint) -> bool:
    try:
        return requests.get(f"{endpoint.origin}/health", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def _children() -> list[int]:
    return [p.pid for p in psutil.Process().children() if "llamacpp/server.py" in " ".join(p.cmdline())]
