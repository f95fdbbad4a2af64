"""Switches with engines that are slow, crash, hang or ignore signals, on the fake llama-server."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable

import psutil
import pytest

from tests.support.console import DEMO_MODELS, FAKE_LLAMA_SERVER, TIMEOUT, Console, fake_model, wait_until

TIGHT_GB = 0.65
"""A budget in which a model that needs 0.6 GB displaces one that holds 80 MB."""
ROOMY = (
    fake_model("good")
    + fake_model("soon", "slow_load:2")
    + fake_model("slow", "slow_load:30")
    + fake_model("bad", "crash_loading", "slow_load:1.5")
    + fake_model("dies", "crash_ready:0.3")
    + fake_model("huge", required_gb=900)
    + "".join(fake_model(fault, fault) for fault in ("crash_loading", "refuse_first"))
)
TIGHT = "".join(
    [
        fake_model("good", "hold:80", required_gb=0.6),
        fake_model("bad", "crash_loading", required_gb=0.6),
        fake_model("slow", "slow_load:30", required_gb=0.6),
        fake_model("talker", "slow_tokens:0.2", "hold:80", required_gb=0.6),
        fake_model("slow-talker", "slow_tokens:0.3", "hold:80", required_gb=0.6),
    ]
)

StartConsole = Callable[..., Console]


@pytest.fixture(scope="module")
def start_shared_with_fakes(start_shared: StartConsole) -> StartConsole:
    def start(toml: str, **settings: object) -> Console:
        return start_shared(toml=toml, llamacpp_server=FAKE_LLAMA_SERVER, **settings)

    return start


@pytest.fixture(scope="module")
def shared(start_shared_with_fakes: StartConsole) -> Console:
    """A console with memory for every model except `huge`."""
    return start_shared_with_fakes(ROOMY)


@pytest.fixture(scope="module")
def shared_tight(start_shared_with_fakes: StartConsole) -> Console:
    return start_shared_with_fakes(TIGHT, memory_budget_gb=TIGHT_GB)


@pytest.fixture
def tight(shared_tight: Console) -> Console:
    """A console at rest with memory for one model: each of them declares 0.6 GB."""
    return shared_tight.reset()


def test_a_slow_load_shows_bytes_read_of_bytes_to_read(start_with_fakes, tmp_path):
    """Measured progress that never falls, with bytes read, total bytes and the time left."""
    large = shutil.copy(DEMO_MODELS / "switchyard-small.gguf", tmp_path / "large.gguf")
    os.truncate(large, 90_000_000)  # much larger than the libraries, which a native server reads too
    console = start_with_fakes(fake_model("slow", "slow_load:1.5", source=str(large)))
    seen = [data for name, data in console.switch_stream("slow") if name == "progress"]
    measured = [data for data in seen if data.get("basis") == "measured"]
    assert len(measured) >= 3
    assert all("MB read" in data["detail"] for data in measured)
    assert any(data["eta"] is not None and data["eta"] >= 1 for data in measured)
    progress = [data["progress"] for data in seen]
    assert progress == sorted(progress)


def test_a_crashing_load_restores_what_was_unloaded(tight):
    """The error has the first cause and what is running now; the log tail is kept."""
    tight.switch("good")
    seen = list(tight.switch_stream("bad"))
    name, error = seen[-1]
    assert (name, error["error"]) == ("error", "load_failed")
    assert "the fake was told to crash" in error["message"]
    assert "good is running again" in error["message"]
    assert ("stage", "rolling_back") in [(n, d.get("stage")) for n, d in seen]
    status = tight.status()
    assert status["models"]["bad"]["status"] == "failed"
    assert "told to crash" in status["models"]["bad"]["error"]
    assert (status["models"]["good"]["status"], status["active_model"]) == ("running", "good")
    assert tight.ask("Hello").json()["model"] == "good"


@pytest.mark.parametrize(
    ("fault", "words"),
    [("crash_loading", "told to crash"), ("refuse_first", "first answer"), ("never_ready", "not ready after 1 s")],
)
def test_every_load_failure_has_its_own_message(request, start_with_fakes, fault, words):
    """502 with the cause; the model is shown as failed with it; no process is left."""
    if fault == "never_ready":
        console = start_with_fakes(fake_model(fault, fault), load_timeout_seconds=1)
    else:  # long enough for its start on a busy machine
        console = request.getfixturevalue("console")
    answer = console.post("/v1/models/switch", {"target_model": fault, "wait": True})
    assert (answer.status_code, answer.json()["error"]) == (502, "load_failed")
    assert words in answer.json()["message"]
    assert console.model(fault)["status"] == "failed"
    assert words in console.model(fault)["error"]
    assert console.engines() == []


def test_a_failed_model_can_be_loaded_again(console):
    """The failure is cleared when the next load begins, and shown again if that fails too."""
    console.post("/v1/models/switch", {"target_model": "bad", "wait": True})
    console.post("/v1/models/switch", {"target_model": "bad"})
    assert console.model("bad")["status"] == "loading"
    console.wait_for(lambda s: s["models"]["bad"]["status"] == "failed", "the second failure")


def test_a_missing_native_server_names_its_setting(start_console):
    """The error says that the native server is missing, and which setting to change."""
    console = start_console(llamacpp_server="/no/such/llama-server")
    answer = console.post("/v1/models/switch", {"target_model": "switchyard-mini"})
    assert answer.status_code == 502
    assert "llamacpp_server" in answer.json()["message"]
    assert "No such file" in answer.json()["message"]


def test_a_crash_of_a_ready_model_is_noticed_and_shown(console):
    """At once, with the tail of its log; the app keeps serving and the memory is freed."""
    console.switch("dies")
    status = console.wait_for(lambda s: s["models"]["dies"]["status"] == "failed", "the crash to be noticed")
    assert "exit code 3" in status["models"]["dies"]["error"]
    assert status["active_model"] is None
    assert status["gpu"]["devices"][-1]["models"] == {}
    console.switch("good")
    assert console.ask("Hello").status_code == 200


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace_period(start_with_fakes):
    """Unloading it takes the grace period and no longer, and the process is gone."""
    console = start_with_fakes(fake_model("stubborn", "ignore_sigterm"), unload_timeout_seconds=0.5)
    console.switch("stubborn")
    (engine,) = console.engines()
    assert console.post("/v1/models/stubborn/stop").status_code == 200
    assert not psutil.pid_exists(engine.pid)


def test_a_cancelled_load_restores_what_was_unloaded(tight):
    """Cancel in the middle: the half-loaded process is gone and the earlier model answers again."""
    tight.switch("good")
    tight.post("/v1/models/switch", {"target_model": "slow"})
    assert tight.model("slow")["status"] == "loading"
    answer = tight.delete("/v1/models/switch").json()
    assert (answer["status"], answer["model"]) == ("cancelled", "slow")
    status = tight.status()
    assert status["models"]["slow"]["status"] == "stopped"
    assert (status["models"]["good"]["status"], status["active_model"]) == ("running", "good")
    assert len(tight.engines()) == 1


def test_closing_the_stream_does_not_cancel_the_switch(console):
    """Seed 001: a client that disconnects stops nothing."""
    stream = console.switch_stream("soon")
    next(stream)
    stream.close()
    console.wait_for(lambda s: s["models"]["soon"]["status"] == "running", "the switch to finish")


def test_a_new_switch_cancels_the_running_one_by_default(console):
    """The event stream of the first switch says that it was superseded, and by which."""
    ended: list[tuple[str, dict]] = []
    follower = threading.Thread(target=lambda: ended.extend(console.switch_stream("slow")), daemon=True)
    follower.start()
    console.wait_for(lambda s: s["models"]["slow"]["status"] == "loading", "the load to begin")
    console_two = _second_client(console)
    console_two.switch("good")
    follower.join(TIMEOUT)
    assert ended[-1][0] == "error"
    assert ended[-1][1]["error"] == "cancelled"
    assert "replaced by a switch to good" in ended[-1][1]["message"]
    assert console.states()["slow"] == "stopped"


def test_a_new_switch_can_be_refused_or_queued_instead(console):
    """`replace` decides what happens to the switch under way; the queue is visible."""
    console.post("/v1/models/switch", {"target_model": "soon"})
    refused = console.post("/v1/models/switch", {"target_model": "good", "replace": "refuse"})
    assert (refused.status_code, refused.json()["error"]) == (409, "switch_in_progress")
    waiting = threading.Thread(target=lambda: _second_client(console).switch("good", replace="queue"), daemon=True)
    waiting.start()
    wait_until(
        lambda: [q["model"] for q in console.get("/v1/models/switch").json()["queue"]] == ["good"],
        "the second switch to be queued",
    )
    waiting.join(TIMEOUT)
    assert console.states() | {"soon": "running", "good": "running"} == console.states()
    assert console.status()["active_model"] == "good"


def test_a_refused_target_does_not_cancel_the_switch_under_way(console):
    """A target that can't fit must not cancel a load that can."""
    console.post("/v1/models/switch", {"target_model": "soon"})
    assert console.post("/v1/models/switch", {"target_model": "huge"}).status_code == 409
    console.wait_for(lambda s: s["models"]["soon"]["status"] == "running", "the first switch to finish")


def test_a_busy_model_finishes_its_answer_before_it_is_unloaded(tight):
    """The answer under way is complete, although the switch needs the memory."""
    tight.switch("talker")
    answers: list[str] = []
    asking = threading.Thread(
        target=lambda: answers.append(_second_client(tight).ask("Hello", model="talker").text), daemon=True
    )
    asking.start()
    tight.wait_for(lambda s: s["models"]["talker"]["in_flight"] == 1, "the request to arrive")
    assert tight.switch("good")["unloaded_models"] == ["talker"]
    asking.join(TIMEOUT)
    assert "ten short words" in answers[0]


def test_a_cancel_while_draining_keeps_the_model_loaded(tight):
    """Nothing was unloaded yet: the model accepts requests again."""
    tight.switch("slow-talker")
    asking = threading.Thread(target=lambda: _second_client(tight).ask("Hello", model="slow-talker"), daemon=True)
    asking.start()
    tight.wait_for(lambda s: s["models"]["slow-talker"]["in_flight"] == 1, "the request to arrive")
    switching = threading.Thread(
        target=lambda: _second_client(tight).post("/v1/models/switch", {"target_model": "good"}), daemon=True
    )
    switching.start()
    tight.wait_for(lambda s: (s["switch"] or {}).get("stage") == "draining", "the drain to begin")
    assert tight.delete("/v1/models/switch").json()["status"] == "cancelled"
    assert tight.ask("Hello", model="slow-talker", max_tokens=1).status_code == 200
    asking.join(TIMEOUT)
    switching.join(TIMEOUT)
    assert tight.states()["slow-talker"] == "running"


def _second_client(console: Console) -> Console:
    """The same console with a connection of its own, for another thread."""
    import copy

    import requests

    other = copy.copy(console)
    other.http = requests.Session()
    other.http.trust_env = False
    return other


STUCK = {
    "messages": [{"role": "user", "content": "Hello"}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "stuck",
            "schema": {
                "type": "object",
                "properties": {"a": {"type": "string", "pattern": "^" + "(a|b)?" * 1600 + "$"}},
                "required": ["a"],
            },
        },
    },
}
"""10 KB from which llama.cpp makes a grammar that blocks it for minutes, while `/health` returns 200."""


def test_a_request_that_blocks_the_engine_does_not_block_the_model(start_console: StartConsole) -> None:
    """With the real embedded engine: it is restarted, the request gets an error, and later ones are answered."""
    console = start_console(unresponsive_seconds=3)
    console.switch("switchyard-mini")
    before = console.engines()[0].pid
    refused = console.post("/v1/chat/completions", {"model": "switchyard-mini", **STUCK})
    assert refused.status_code == 502
    assert refused.json()["error"]["code"] == "engine_unreachable"
    answer = console.ask("Hello", model="switchyard-mini")
    assert answer.status_code == 200
    assert before not in [engine.pid for engine in console.engines()]
