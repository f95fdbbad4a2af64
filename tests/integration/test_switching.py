"""Switching between the embedded demo models over HTTP, with real processes."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.console import DEMO_MODELS, TIMEOUT, Console, fake_model, wait_until

MINI, SMALL = "switchyard-mini", "switchyard-small"


def budget_for_one(console: Console) -> float:
    """A memory budget, in GB, for either demo model but not both."""
    console.switch(MINI)
    console.switch(SMALL)
    needs = [m["gpu_memory_required_gb"] for m in console.status()["models"].values()]
    return max(needs) * 1.2


@pytest.fixture(scope="module")
def shared_tight(shared: Console, start_shared: Callable[..., Console]) -> Console:
    return start_shared(memory_budget_gb=budget_for_one(shared))


@pytest.fixture
def tight(shared_tight: Console) -> Console:
    """A console at rest whose budget is enough for one of the two models."""
    return shared_tight.reset()


def test_a_switch_streams_its_stages_in_order_and_the_model_then_answers(console):
    """Seed 001's stream: checking first, complete last, progress never falling; then the model answers."""
    seen = list(console.switch_stream(MINI))
    names = [(name, data.get("stage")) for name, data in seen]
    assert names[0] == ("stage", "checking_memory")
    assert ("stage", "loading_target") in names
    assert names[-1] == ("complete", None)
    progress = [data["progress"] for _, data in seen if "progress" in data]
    assert progress == sorted(progress)
    assert max(progress) < 100
    assert seen[-1][1]["model"] == MINI
    answer = console.ask("Who are you?").json()
    assert answer["model"] == MINI


def test_a_switch_answers_json_in_seed_003s_shape(console):
    """A started switch, a ready model and an already loaded one each have their response."""
    answer = console.post(f"/v1/models/switch?target_model={MINI}")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["status"], body["model"], body["unloaded_models"]) == ("success", MINI, [])
    assert body["memory_info"]["required_gb"] > 0
    console.wait_for(lambda s: s["models"][MINI]["status"] == "running", "the model to run")
    again = console.post("/v1/models/switch", {"target_model": MINI}).json()
    assert (again["status"], again["model"]) == ("already_loaded", MINI)


def test_if_only_one_fits_the_other_is_unloaded_and_the_status_is_always_consistent(tight):
    """The ledger never over-commits, and no status shows both models running."""
    tight.switch(MINI)
    moments: list[dict] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            moments.append(tight.status())

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    answer = tight.switch(SMALL)
    done.set()
    looking.join()
    assert answer["unloaded_models"] == [MINI]
    assert answer["memory_info"]["freed_gb"] > 0
    moments.append(tight.status())
    for moment in moments:
        running = [m for m, model in moment["models"].items() if model["status"] == "running"]
        assert len(running) <= 1
        device = moment["gpu"]["devices"][-1]
        assert device["used_gb"] <= device["total_gb"]
        assert sum(device["models"].values()) + device["reserved_gb"] <= device["total_gb"] + 0.002
    assert moments[-1]["active_model"] == SMALL
    assert tight.model(MINI)["status"] == "stopped"


def test_a_plan_shows_what_would_be_unloaded_and_changes_nothing(tight):
    """What it would unload, what that frees and what stays free."""
    tight.switch(MINI)
    version = tight.status()["version"]
    plan = tight.post("/v1/models/switch/plan", {"target_model": SMALL}).json()
    assert plan["feasible"]
    assert [u["model"] for u in plan["unload"]] == [MINI]
    assert plan["unload"][0]["frees_gb"] > 0
    assert plan["after"]["available_gb"] >= 0
    assert tight.status()["version"] == version
    assert tight.model(MINI)["status"] == "running"


def test_a_target_that_does_not_fit_is_refused_before_anything_is_unloaded(start_console):
    """409 with the figures; the running model keeps running in the same process."""
    toml = f'[[models]]\nid = "huge"\nsource = "{SMALL}.gguf"\nrequired_gb = 900.0\n'
    console = start_console(toml=toml)
    console.switch(MINI)
    before = {p.pid for p in console.engines()}
    answer = console.post("/v1/models/switch", {"target_model": "huge"})
    assert answer.status_code == 409
    body = answer.json()
    assert (body["status"], body["error"], body["freed_gb"]) == ("error", "insufficient_memory", 0)
    assert body["required_gb"] == 900.0
    assert body["total_available_gb"] < 900
    assert "huge needs 900.0 GB" in body["message"]
    assert [limit["limit"] for limit in body["limits"]] == ["device_size"]
    assert MINI not in body["message"].replace(f"{MINI} is still running", ""), "a loaded model is no alternative"
    asked = console.ask("Hello", model="huge")
    assert (asked.status_code, asked.json()["error"]["code"]) == (409, "insufficient_memory")
    assert "System memory has" in asked.json()["error"]["message"]
    assert console.states()[MINI] == "running"
    assert before <= {p.pid for p in console.engines()}
    streamed = list(console.switch_stream("huge"))
    assert streamed[-1][0] == "error"
    assert streamed[-1][1]["error"] == "insufficient_memory"


def test_both_stay_loaded_when_both_fit_and_each_answers_by_name(console):
    """Nothing is unloaded without need; a request by name reaches its model, `auto` the active one."""
    console.switch(MINI)
    console.switch(SMALL)
    assert console.states() == {MINI: "running", SMALL: "running"}
    assert console.ask("Hello", model=MINI).json()["model"] == MINI
    assert console.ask("Hello", model="auto").json()["model"] == SMALL


def test_unloading_ends_the_process_and_frees_the_memory(console):
    """After `stop` the process is gone, the model has no state, and another running one is active."""
    console.switch(MINI)
    console.switch(SMALL)
    engines = {p.pid for p in console.engines()}
    assert console.post(f"/v1/models/{SMALL}/stop").json() == {"status": "success", "model": SMALL}
    status = console.status()
    assert status["models"][SMALL]["status"] == "stopped"
    assert status["active_model"] == MINI
    assert SMALL not in status["gpu"]["devices"][-1]["models"]
    assert len([pid for pid in engines if psutil.pid_exists(pid)]) == len(engines) - 1


def test_restarting_loads_the_model_into_a_new_process(console):
    """The same model, active as before, in another process."""
    console.switch(MINI)
    before = {p.pid for p in console.engines()}
    assert console.post(f"/v1/models/{MINI}/restart").status_code == 200
    status = console.status()
    assert status["models"][MINI]["status"] == "running"
    assert status["active_model"] == MINI
    assert {p.pid for p in console.engines()} - before


def test_ten_switches_in_one_second_end_in_one_clear_state(console):
    """Each request gets a clear response, the last requested model runs, and nothing is half done."""
    answers: dict[int, tuple[int, dict]] = {}

    def ask(number: int) -> None:
        target = (MINI, SMALL)[number % 2]
        answer = console.post("/v1/models/switch", {"target_model": target, "wait": True})
        answers[number] = (answer.status_code, answer.json())

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for code, body in answers.values():
        assert (code, body["status"]) in {(200, "success"), (200, "already_loaded"), (409, "error")}
        if code == 409:
            assert body["error"] == "cancelled"
    status = console.wait_for(lambda s: s["switch"] is None, "the last switch to end")
    assert status["active_model"] in (MINI, SMALL)
    assert status["models"][status["active_model"]]["status"] == "running"
    assert console.ask("Hello").status_code == 200


def test_gguf_files_are_listed_and_unlisted_automatically(start_console, tmp_path):
    """A file put into the models folder is listed; a broken one is listed as failed with the reason."""
    folder = tmp_path / "models"
    folder.mkdir()
    console = start_console(models_dir=folder)
    assert console.status()["models"] == {}
    shutil.copy(DEMO_MODELS / f"{MINI}.gguf", folder / "dropped-in.gguf")
    (folder / "broken.gguf").write_bytes((DEMO_MODELS / f"{SMALL}.gguf").read_bytes()[:100_000])
    status = console.wait_for(lambda s: set(s["models"]) == {"dropped-in", "broken"}, "both files to be listed")
    assert status["models"]["broken"]["status"] == "failed"
    assert "incomplete" in status["models"]["broken"]["error"]
    assert console.post("/v1/models/switch", {"target_model": "broken"}).status_code == 409
    console.switch("dropped-in")
    (folder / "broken.gguf").unlink()
    console.wait_for(lambda s: set(s["models"]) == {"dropped-in"}, "the deleted file to be unlisted")


def test_the_time_of_a_load_is_learned_and_kept_across_a_restart(start_console):
    """Unknown before the first load, then the measured time, also after a restart."""
    console = start_console()
    assert console.model(MINI)["estimated_load_time_seconds"] is None
    console.switch(MINI)
    learned = console.model(MINI)["estimated_load_time_seconds"]
    assert learned > 0
    console.stop()
    console.start()
    assert console.model(MINI)["estimated_load_time_seconds"] == learned


def test_sigterm_ends_every_process(own_console):
    """No engine is left, including the standby process, and the exit is clean and quick."""
    own_console.switch(MINI)
    children = own_console.children()
    assert own_console.stop() == 0
    _, alive = psutil.wait_procs(children, timeout=TIMEOUT)
    assert not alive


def test_half_loaded_engines_of_a_crashed_run_are_ended(start_with_fakes):
    """After SIGKILL to the app the engine keeps running; the next run finds its record and ends it."""
    console = start_with_fakes(fake_model("slow", "slow_load:60"))
    console.post("/v1/models/switch", {"target_model": "slow"})
    engines = console.engines()
    console.kill()
    assert any(p.is_running() for p in engines)
    console.start()
    wait_until(lambda: not any(_alive(p) for p in engines), "the engines of the earlier run to end")
    assert console.states()["slow"] == "stopped"


def test_a_second_copy_on_the_same_state_folder_is_refused(console, start_console):
    """The message names the folder, the running process and what to do."""
    console.switch(MINI)
    with pytest.raises(AssertionError, match=r"already running on the state folder[\s\S]*SWITCHYARD_STATE_DIR"):
        start_console(state_dir=console.environment["SWITCHYARD_STATE_DIR"])
    assert console.ask("Hello").status_code == 200  # the first copy's engine is left alone


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_sigint_stops_as_cleanly_as_sigterm(own_console):
    """Ctrl-C in the terminal of `make run`."""
    own_console.switch(MINI)
    children = own_console.children()
    assert own_console.stop(signal.SIGINT) == 0
    _, alive = psutil.wait_procs(children, timeout=TIMEOUT)
    assert not alive


def test_the_standby_process_blocks_until_its_first_line_comes(own_console):
    """gevent's sockets don't block: it read an end where nothing had come yet, and ended, in a switch at the worst."""
    wait_until(own_console.engines, "the standby process")
    (standby,) = own_console.engines()
    fields = Path(f"/proc/{standby.pid}/fdinfo/0").read_text().split()
    assert not int(fields[fields.index("flags:") + 1], 8) & os.O_NONBLOCK
