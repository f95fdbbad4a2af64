"""The short endpoints of seeds 000 and 002, and what keeps strangers out."""

from __future__ import annotations

import pytest

from tests.support.console import stand_in

MINI = "switchyard-mini"


def test_switch_model_answers_at_once_and_the_loading_status_follows(start_stand_in):
    """Seed 000's workflow: switch, poll until ready, and its shapes."""
    console = start_stand_in(stand_in("slow", "slow_load:0.8"))
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


def test_a_failed_switch_is_an_error_in_the_loading_status(start_stand_in):
    """The poller learns the cause and can stop polling."""
    console = start_stand_in(stand_in("bad", "crash_loading"))
    console.post("/v1/models/switch", {"target_model": "bad", "wait": True})
    status = console.get("/api/model-loading-status").json()
    assert status["status"] == "error"
    assert "told to crash" in status["message"]


@pytest.mark.parametrize(("query", "code"), [("", "invalid_value"), ("?model_id=nope", "model_not_found")])
def test_switch_model_says_what_is_wrong(console, query, code):
    """Outside /v1 errors have the flat shape."""
    answer = console.post(f"/api/switch-model{query}")
    assert answer.json()["status"] == "error"
    assert answer.json()["error"] == code
    assert answer.status_code in (404, 422)


@pytest.mark.parametrize("host", ["evil.example", "[", "127.0.0.1.evil.example:8787"])
def test_a_foreign_host_name_is_refused(console, host):
    """DNS rebinding: a name that isn't ours, pointed at this address, gets nothing, on no path."""
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
    """Unsafe methods from elsewhere are refused; reading stays possible, as browsers keep the answer from the page."""
    assert console.post(f"/v1/models/switch?target_model={MINI}", headers=headers).status_code == 403
    assert console.states()[MINI] == "stopped"


def test_the_own_page_and_plain_scripts_can_act(console):
    """Same origin, typed by hand, or no browser at all."""
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": console.url}, {}):
        assert console.post(f"/v1/models/switch?target_model={MINI}", headers=headers).status_code == 200


def test_switching_is_rate_limited_with_retry_after(start_console):
    """Seed 001: at most N switches a minute; the refusal says when to try again."""
    console = start_console(switch_rate_limit="2/minute")
    codes = [console.post("/v1/models/switch", {"target_model": "nope"}).status_code for _ in range(3)]
    assert codes == [404, 404, 429]
    answer = console.post("/v1/models/switch", {"target_model": "nope"})
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["error"]["code"] == "rate_limited"
    assert console.get("/v1/models/status").status_code == 200


def test_every_page_and_answer_carries_the_security_headers(console):
    """Strict CSP without inline script, no sniffing, no framing."""
    for path in ("/", "/models", "/v1/models/status", "/nothing-here"):
        headers = console.get(path).headers
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
