"""The plan over HTTP, for people and scripts: why a model doesn't fit, and links to the models it names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blueprints import filters
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
    """The larger demo model needs 400 MB, the other one 100."""
    tight.services.catalog.refresh()
    sizes = {SMALL: 400_000_000, MINI: 100_000_000}
    monkeypatch.setattr(
        tight.services.switcher._planner, "need", lambda model: Need("host", sizes[model.id], "declared")
    )
    tight.reset()


def test_the_plan_names_the_setting_that_keeps_a_model_out(tight: InProcess) -> None:
    """For scripts with its figures, for people with the value that would suffice."""
    plan = tight.client.post("/v1/models/switch/plan", json={"target_model": SMALL}).get_json()
    assert not plan["feasible"]
    assert plan["limits"] == [{"limit": "memory_budget_gb", "gb": 0.3, "short_gb": 0.1, "programs": []}]
    page = tight.client.get(f"/models/plan?target={SMALL}").text
    words = "The setting memory_budget_gb limits all models together to 300 MB. Raise it to at least 0.4 to make room."
    assert words in page
    assert "Close other programs" not in page


def test_a_loaded_model_is_not_offered_as_an_alternative(tight: InProcess) -> None:
    """People have that model already."""
    assert plan_of(tight)["alternatives"] == [MINI]
    tight.show(MINI)
    assert plan_of(tight)["alternatives"] == []
    page = tight.client.get(f"/models/plan?target={SMALL}").text
    assert "would fit" not in page


def test_the_plan_links_to_the_models_page_and_to_the_rows_of_the_models_it_names(tight: InProcess) -> None:
    """Like the banner, also on the page that is shown without JavaScript."""
    page = tight.client.get(f"/models/plan?target={SMALL}&back=/").text
    assert link_to_row(SMALL) in page
    assert '<a class="button" href="/models">Models</a>' in page
    on_models = tight.client.get(f"/models/plan?target={SMALL}&back=/models").text
    assert on_models.count('class="button"') == 1, "Back is the only button: it leads there already"


def test_a_dialog_on_the_models_page_has_no_links_into_the_page_behind_it(tight: InProcess) -> None:
    """They would scroll the page behind the dialog and leave the dialog open."""
    dialog = tight.client.get(f"/models/plan?target={SMALL}", headers={"HX-Request": "true"}).text
    assert f"<b>{SMALL}</b>" in dialog
    assert "/models#row-" not in dialog
    on_chat = tight.client.get(f"/models/plan?target={SMALL}&back=/", headers={"HX-Request": "true"}).text
    assert link_to_row(SMALL) in on_chat


def link_to_row(model_id: str) -> str:
    return f'<a class="model-link" href="/models#row-{filters.dom_id(model_id)}">{model_id}</a>'


def plan_of(tight: InProcess) -> dict[str, object]:
    plan: dict[str, object] = tight.client.post("/v1/models/switch/plan", json={"target_model": SMALL}).get_json()
    return plan
