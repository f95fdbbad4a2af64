"""Requests during a restart of the app: each gets its real answer, if necessary from the next worker."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import requests

from tests.support.console import Console, fake_model, wait_until

StartConsole = Callable[..., Console]


def chat(console: Console, model: str, **options: object) -> requests.Response:
    """A chat request over a connection of its own."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **options}
    return requests.post(f"{console.url}/v1/chat/completions", json=body, timeout=60)


def test_requests_during_a_restart_are_answered_after_it(start_with_fakes: StartConsole) -> None:
    """For loaded and unloaded models, streamed or not, on new and kept-alive connections; the old worker ends.

    Such requests got a 499, or a switch that the restart then aborted.
    """
    console = start_with_fakes(fake_model("a") + fake_model("b", "slow_load:1"), memory_budget_gb=0.5)
    console.switch("a")
    before = {child.pid for child in console.children()} - {engine.pid for engine in console.engines()}
    assert console.post("/api/restart-api").status_code == 200
    with ThreadPoolExecutor(9) as pool:
        pending = [pool.submit(chat, console, model) for model in ("a", "b", "auto", "b")]
        pending += [pool.submit(chat, console, model, stream=True) for model in ("a", "b")]
        pending.append(pool.submit(console.ask, "Hello", model="b"))  # on the connection of the restart request
        status = pool.submit(requests.get, f"{console.url}/v1/models/status", timeout=60)
        answers = [future.result() for future in pending]
    assert [answer.status_code for answer in answers] == [200] * 7, [answer.text for answer in answers]
    assert all("fake" in answer.text for answer in answers)
    assert status.result().status_code == 200
    wait_until(lambda: not before & {child.pid for child in console.children()}, "the old worker to end")
    states = console.states()
    assert (states["a"], states["b"]) == ("running", "running")


def test_the_first_status_after_a_start_includes_loaded_models(start_with_fakes: StartConsole) -> None:
    """After a crash, loaded models were shown as stopped until their engines had been polled."""
    console = start_with_fakes(fake_model("a", "slow_health:0.4"))
    console.switch("a")
    console.kill()
    answers: list[requests.Response] = []

    def answered() -> bool:
        with suppress(requests.ConnectionError):
            answers.append(requests.get(f"{console.url}/v1/models/status", timeout=60))
        return bool(answers)

    with ThreadPoolExecutor(1) as starter:
        started = starter.submit(console.start)  # waits for /readyz, which is later
        wait_until(answered, "the first answer")
        started.result()
    assert answers[0].json()["models"]["a"]["status"] == "running"


def test_an_answer_aborted_by_a_restart_gets_its_own_error(start_with_fakes: StartConsole) -> None:
    """It had reached an engine, so it isn't sent again; its error is `stopping`, not that of a disconnect."""
    console = start_with_fakes(fake_model("slow", "slow_tokens:3"))
    console.switch("slow")
    with ThreadPoolExecutor(1) as asker:
        answer = asker.submit(chat, console, "slow")
        console.wait_for(lambda s: s["models"]["slow"]["in_flight"] == 1, "the request to be in flight")
        assert console.post("/api/restart-api").status_code == 200
    assert answer.result().status_code == 503
    assert answer.result().json()["error"]["code"] == "stopping"
    assert answer.result().headers["Retry-After"]
