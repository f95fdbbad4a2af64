"""`/metrics`: Prometheus can read it, and its figures follow the status."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.heart.rig import Heart
from tests.support.in_process import InProcess

MINI, SMALL = "switchyard-mini", "switchyard-small"


def scrape(console: InProcess) -> dict[tuple[str, tuple[str, ...]], float]:
    """Each sample by its name and the values of its labels, which are in the order of their names."""
    answer = console.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_states_and_requests_follow_the_status(console: InProcess) -> None:
    view = console.show(MINI)
    view.traffic.enter()
    view.traffic.enter()
    view.traffic.leave()
    found = scrape(console)
    assert found["switchyard_model_state", ("llamacpp", "text", MINI, "running")] == 1
    assert found["switchyard_model_state", ("llamacpp", "text", SMALL, "stopped")] == 1
    assert found["switchyard_model_active", (MINI,)] == 1
    assert found["switchyard_requests_in_flight", (MINI,)] == 1
    assert found["switchyard_requests_total", (MINI,)] == 1
    assert found["switchyard_switch_under_way", ()] == 0
    assert found["process_resident_memory_bytes", ()] > 1_000_000


def test_a_devices_parts_are_its_accounts(console: InProcess) -> None:
    found = scrape(console)
    (host,) = console.services.status.current().devices
    assert found["switchyard_device_memory_bytes", (host.id, host.name, "total")] == host.total_bytes


def test_labels_are_escaped(console: InProcess) -> None:
    """A model's name can come from another program."""
    console.show('evil"} 1\n# HELP x')
    assert scrape(console)["switchyard_requests_in_flight", ('evil"} 1\n# HELP x',)] == 0


def test_switches_are_counted_by_their_outcome_and_requests_survive_an_unload() -> None:
    heart = Heart()
    heart.ready("small")
    request = heart.ask("small")
    heart.until(lambda: request.outcome is not None, "the answer")
    heart.faults("medium").crash_loading = True
    heart.done(heart.switch("medium"))
    heart.done(heart.switcher.stop("small", requested_by="test"))
    tally = heart.switcher.tally
    assert (tally.switches["success"], tally.switches["failed"]) == (1, 1)
    assert tally.seconds["success"] > 0
    assert tally.failed_loads == {"medium": 1}
    assert heart.now.answered == {"small": 1}
    heart.close()
