"""The short script endpoints of seeds 000 and 002, and the checks against other sites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.console import FAKE_LLAMA_SERVER, Console, fake_model, wait_until

MINI = "switchyard-mini"


@pytest.fixture(scope="module")
def shared_with_fakes(start_shared: Callable[..., Console]) -> Console:
    models = (
        fake_model("slow", "slow_load:0.8") + fake_model("bad", "crash_loading") + fake_model("endless", "slow_load:60")
    )
    return start_shared(toml=models, llamacpp_server=FAKE_LLAMA_SERVER)


@pytest.fixture
def console_with_fakes(shared_with_fakes: Console) -> Console:
    """A console at rest whose models are slow to load, or fail."""
    return shared_with_fakes.reset()


def test_switch_model_answers_at_once_and_the_loading_status_follows(console_with_fakes):
    """Seed 000's workflow: switch, poll until ready; with the response shapes."""
    console = console_with_fakes
    assert console.get("/api/model-loading-status").json()["status"] == "idle"
    answer = console.post("/api/switch-model?model_id=slow").json()
    assert (answer["status"], answer["message"], answer["model_id"]) == ("switching", "Switching to slow", "slow")
    assert answer["estimated_time_seconds"] > 0
    seen = set()
    while (status := console.get("/api/model-loading-status").json())["status"] != "ready":
        assert status["model_loaded"] is False
        seen.add(status["status"])
    assert seen <= {"starting", "loading"}
    assert "loading" in seen
    assert (status["model_loaded"], status["current_model"], status["progress"]) == (True, "slow", 100)


def test_a_failed_switch_is_an_error_in_the_loading_status(console_with_fakes):
    """The polling script learns the cause and can stop."""
    console = console_with_fakes
    console.post("/v1/models/switch", {"target_model": "bad", "wait": True})
    status = console.get("/api/model-loading-status").json()
    assert status["status"] == "error"
    assert "told to crash" in status["message"]


@pytest.mark.parametrize(("query", "code"), [("", "invalid_value"), ("?model_id=nope", "model_not_found")])
def test_switch_model_reports_errors(client, query, code):
    """Outside /v1 errors have the flat shape."""
    answer = client.post(f"/api/switch-model{query}")
    assert answer.json["status"] == "error"
    assert answer.json["error"] == code
    assert answer.status_code in (404, 422)


@pytest.mark.parametrize("host", ["evil.example", "[", "127.0.0.1.evil.example:8787"])
def test_a_foreign_host_name_is_refused(console, host):
    """DNS rebinding: a host name that isn't ours gets nothing, on any path."""
    assert console.get("/v1/models/status", headers={"Host": host}).status_code in (400, 403)
    asked = console.post("/v1/chat/completions", {"messages": []}, headers={"Host": host})
    assert asked.status_code in (400, 403)


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_a_page_of_another_site_can_not_act(console, headers):
    """Unsafe methods from other sites are refused; reading isn't: browsers hide the response from such a page."""
    assert console.post(f"/v1/models/switch?target_model={MINI}", headers=headers).status_code == 403
    assert console.states()[MINI] == "stopped"


def test_the_own_page_and_plain_scripts_can_act(console):
    """Same origin, a typed address, or a client other than a browser."""
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": console.url}, {}):
        assert console.post(f"/v1/models/switch?target_model={MINI}", headers=headers).status_code == 200


def test_switching_is_rate_limited_with_retry_after(make_app):
    """Seed 001: at most N switches a minute, then 429 with Retry-After."""
    client = make_app(switch_rate_limit="2/minute").test_client()
    codes = [client.post("/v1/models/switch", json={"target_model": "nope"}).status_code for _ in range(3)]
    assert codes == [404, 404, 429]
    answer = client.post("/v1/models/switch", json={"target_model": "nope"})
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json["error"]["code"] == "rate_limited"
    assert client.get("/v1/models/status").status_code == 200


def test_every_page_and_answer_carries_the_security_headers(client):
    """Strict CSP without inline script, no sniffing, no framing."""
    for path in ("/", "/models", "/v1/models/status", "/nothing-here"):
        headers = client.get(path).headers
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_switch_model_writes_the_choice_to_the_env_file(start_with_fakes, tmp_path):
    """Seed 000: at once, other lines unchanged; a failed switch restores the old value."""
    path = tmp_path / ".env"
    path.write_text("# ours\nHF_TOKEN='secret'\nVLLM_MODEL=old\nX=1\n")
    console = start_with_fakes(
        fake_model("good") + fake_model("bad", "crash_loading"), env_file=path, env_key="VLLM_MODEL"
    )
    assert console.post("/api/switch-model?model_id=good").status_code == 200
    assert path.read_text() == "# ours\nHF_TOKEN='secret'\nVLLM_MODEL=good\nX=1\n"
    console.wait_for(lambda s: s["models"]["good"]["status"] == "running", "the model to run")
    assert console.post("/api/switch-model?model_id=nope").status_code == 404
    console.post("/api/switch-model?model_id=bad")
    console.wait_for(lambda s: s["models"]["bad"]["status"] == "failed" and not s["switch"], "the failure")
    wait_until(lambda: "VLLM_MODEL=good" in path.read_text(), "the file to be restored")
    assert console.states()["good"] == "running"


def test_nothing_is_switched_when_the_env_file_can_not_be_written(start_with_fakes, tmp_path):
    """The response says so; the file and the models stay unchanged."""
    console = start_with_fakes(fake_model("good"), env_file=tmp_path)
    answer = console.post("/api/switch-model?model_id=good")
    assert (answer.status_code, answer.json()["error"]) == (409, "env_file_unusable")
    assert "Nothing was switched" in answer.json()["message"]
    assert console.states()["good"] == "stopped"


def restart(console: Console) -> None:
    """Request a restart and wait until another worker answers."""
    worker = {child.pid for child in console.children()}
    answer = console.post("/api/restart-api")
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "restarting"
    wait_until(lambda: not worker & {child.pid for child in console.children()}, "the old worker to end")


def test_restart_api_restarts_the_app_and_keeps_its_models(start_console):
    """Seed 000: the same engine processes and active model, settings read again, no request refused."""
    console = start_console(standby="false")
    console.switch("switchyard-small")
    console.switch(MINI)
    before = sorted(process.pid for process in console.engines())
    assert len(before) == 2
    config = Path(console.environment["SWITCHYARD_CONFIG"])
    config.write_text(config.read_text() + 'strategy = "oldest_first"\n')
    restart(console)
    assert console.get("/healthz").status_code == 200  # the socket stays open, so this waits for the new worker
    states = console.wait_for(
        lambda s: [m["status"] for m in s["models"].values()] == ["running", "running"], "both to be found"
    )
    assert states["active_model"] == MINI
    assert sorted(process.pid for process in console.engines()) == before
    assert console.ask("Hello", model="switchyard-small").status_code == 200
    assert console.ask("Hello").json()["model"]
    console.post(f"/v1/models/{MINI}/stop")
    assert len(console.engines()) == 1
    restart(console)
    console.wait_for(lambda s: s["active_model"] == "switchyard-small", "it to be adopted")
    assert console.stop() == 0
    assert all(map(ended, before))


def ended(pid: int) -> bool:
    """Whether a process has ended. An adopted one is reaped by its current parent."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_preload_does_not_displace_a_loaded_model(start_console):
    """`preload` applies only if nothing is loaded."""
    console = start_console(standby="false", preload=MINI, memory_budget_gb=0.11)
    console.wait_for(lambda s: s["active_model"] == MINI, "the preload")
    console.switch("switchyard-small")
    assert console.states()[MINI] == "stopped"
    restart(console)
    assert console.ask("Hello").status_code == 200  # at once, by the model that was active
    assert console.status()["active_model"] == "switchyard-small"
    assert console.states()[MINI] == "stopped"


def test_a_stop_during_a_restart_leaves_no_engine(start_console):
    """The app ends for good, after which nothing could unload the engine."""
    console = start_console(standby="false")
    console.switch(MINI)
    (engine,) = console.engines()
    assert console.post("/api/restart-api").status_code == 200
    console.stop()
    wait_until(lambda: ended(engine.pid), "the engine to end")


def test_restart_api_refuses_during_a_switch_or_with_invalid_settings(console_with_fakes):
    """In both cases the app continues unchanged."""
    console = console_with_fakes
    console.post("/v1/models/switch", {"target_model": "endless"})
    answer = console.post("/api/restart-api")
    assert (answer.status_code, answer.json()["error"]) == (409, "switch_in_progress")
    console.delete("/v1/models/switch")
    console.wait_for(lambda s: s["switch"] is None, "the switch to end")
    config = Path(console.environment["SWITCHYARD_CONFIG"])
    usable = config.read_text()
    config.write_text(usable + "\n[nonsense]\n")
    answer = console.post("/api/restart-api")
    config.write_text(usable)
    assert (answer.status_code, answer.json()["error"]) == (409, "settings_unusable")
    assert "nonsense" in answer.json()["message"]
    assert console.get("/healthz").status_code == 200


def test_after_a_crash_of_the_app_a_loaded_model_is_adopted(start_console):
    """It isn't loaded again; a model whose settings have changed meanwhile is not adopted."""
    console = start_console(standby="false")
    console.switch(MINI)
    console.switch("switchyard-small")
    before = {process.pid for process in console.engines()}
    console.kill()
    console.start()
    found = console.wait_for(lambda s: s["models"]["switchyard-small"]["status"] == "running", "it to be adopted")
    assert found["active_model"] == "switchyard-small"
    assert {process.pid for process in console.engines()} == before
    console.kill()
    console.environment["SWITCHYARD_CONTEXT_LENGTH"] = "1024"
    console.start()
    wait_until(lambda: all(map(ended, before)), "the old engines to end")
    assert set(console.states().values()) == {"stopped"}


def test_the_exit_of_an_adopted_engine_is_noticed(start_console):
    """It is no longer our child process, so its end isn't reported by the system."""
    console = start_console(standby="false")
    console.switch(MINI)
    console.kill()
    console.start()
    console.wait_for(lambda s: s["models"][MINI]["status"] == "running", "it to be adopted")
    (engine,) = console.engines()
    engine.kill()
    failed = console.wait_for(lambda s: s["models"][MINI]["status"] == "failed", "its end to be noticed")
    assert "ended" in failed["models"][MINI]["error"]
    console.switch(MINI)
