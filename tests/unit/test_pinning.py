"""Pins over HTTP and on the Models page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.support.in_process import InProcess

MINI = "switchyard-mini"


def test_a_pin_is_made_shown_and_removed(console: InProcess) -> None:
    console.show(MINI)
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
    made = console.client.post(f"/v1/models/{MINI}/pin", json={"until": until, "reason": "<b>nightly</b>"})
    assert (made.status_code, made.json["owner"], made.json["reason"]) == (200, "api", "<b>nightly</b>")
    status = console.client.get("/v1/models/status").json["models"][MINI]
    assert status["pinned"] is True
    assert datetime.fromisoformat(status["pin"]["until"]) == datetime.fromisoformat(until)
    page = console.client.get("/models").text
    assert "pinned until" in page
    assert "&lt;b&gt;nightly&lt;/b&gt;" in page
    assert console.client.delete(f"/v1/models/{MINI}/pin").json["status"] == "unpinned"
    assert console.client.delete(f"/v1/models/{MINI}/pin").status_code == 404
    assert console.client.get("/v1/models/status").json["models"][MINI]["pinned"] is False


def test_bad_pins_are_refused_by_name(console: InProcess) -> None:
    for body in ({"until": "2001-01-01T00:00:00Z"}, {"until": "2999-01-01T00:00:00"}, {"until": "soon"}):
        refused = console.client.post(f"/v1/models/{MINI}/pin", json=body)
        assert (refused.status_code, refused.json["error"]["param"]) == (422, "until"), refused.text
    assert console.client.post("/v1/models/no-such-model/pin").status_code == 404
    assert not console.services.pins.current


def test_the_page_pins_and_unpins_without_script(console: InProcess) -> None:
    console.show(MINI)
    form = console.client.get(f"/models/pin?model={MINI}").text
    assert f'action="/models/{MINI}/pin"' in form
    assert console.client.post(f"/models/{MINI}/pin", data={"hours": "4", "reason": "demo"}).status_code == 303
    pin = console.services.pins.current[MINI]
    assert (pin.owner, pin.reason, pin.until is None) == ("page", "demo", False)
    assert "demo" in console.client.get(f"/models/pin?model={MINI}").text
    assert console.client.post(f"/models/{MINI}/unpin").status_code == 303
    assert not console.services.pins.current
