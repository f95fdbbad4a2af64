"""What the plan says of a model that doesn't fit, over HTTP: the setting by its name, and nothing that is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.engines.port import Need
from tests.support.in_process import InProcess, in_process

MINI, SMALL = "switchyard-mini", "switchyard-small"


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """An app with a budget of 300 MB."""
    with in_process(tmp_path_factory.mktemp("app"), memory_budget_gb=0.3) as console:
        yield console


@pytest.fixture(autouse=True)
def needs(tight: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger demo model takes 400 MB, the other one 100."""
    tight.services.catalog.refresh()
    sizes = {SMALL: 400_000_000, MINI: 100_000_000}
    monkeypatch.setattr(
        tight.services.switcher._planner, "need", lambda model: Need("host", sizes[model.id], "declared")
    )
    tight.reset()


def test_the_plan_names_the_setting_that_keeps_a_model_out(tight: InProcess) -> None:
    """For scripts with its figures, for people with the value that would do."""
    plan = tight.client.post("/v1/models/switch/plan", json={"target_model": SMALL}).get_json()
    assert not plan["feasible"]
    assert plan["limits"] == [{"limit": "memory_budget_gb", "gb": 0.3, "short_gb": 0.1, "programs": []}]
    page = tight.client.get(f"/models/plan?target={SMALL}").text
    words = "The setting memory_budget_gb limits all models together to 300 MB. Raise it to at least 0.4 to make room."
    assert words in page
    assert "Close other programs" not in page


def test_a_model_that_is_loaded_is_not_offered_instead(tight: InProcess) -> None:
    """It is what people have already."""
    assert plan_of(tight)["alternatives"] == [MINI]
    tight.show(MINI)
    assert plan_of(tight)["alternatives"] == []
    page = tight.client.get(f"/models/plan?target={SMALL}").text
    assert "would fit" not in page


def plan_of(tight: InProcess) -> dict[str, object]:
    plan: dict[str, object] = tight.client.post("/v1/models/switch/plan", json={"target_model": SMALL}).get_json()
    return plan
