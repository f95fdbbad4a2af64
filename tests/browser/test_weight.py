"""The size of a first visit, and caching."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, Response

from tests.browser.conftest import StartShared
from tests.browser.steps import MINI, visit
from tests.support.console import Console, fake_model

LIMIT = 60_000
"""Bytes of HTML, CSS and JavaScript together, as they travel."""


@pytest.fixture(scope="module")
def shared(start_shared: StartShared) -> Console:
    return start_shared("".join(fake_model(f"model-{number}", source=str(MINI)) for number in range(40)))


def test_the_first_page_is_under_60_kb(page: Page, console: Console) -> None:
    """One page, one stylesheet, one script and an icon, compressed, with forty models in the menu."""
    came: list[Response] = []
    page.on("response", lambda response: came.append(response))
    visit(page, console, "/")
    page.wait_for_load_state("networkidle")
    kinds = sorted(response.request.resource_type for response in came)
    assert [kind for kind in kinds if kind != "other"] == ["document", "script", "stylesheet"]
    assert [r.headers.get("content-encoding") for r in came if r.request.resource_type != "other"] == ["gzip"] * 3
    weight = sum(response.request.sizes()["responseBodySize"] for response in came)
    assert weight < LIMIT, f"{weight} bytes"


def test_a_second_visit_requests_only_the_page(page: Page, console: Console) -> None:
    """The script and the stylesheet are cached for a year under the hash in their address."""
    visit(page, console, "/")
    for name in ("link[rel=stylesheet]", "script"):
        address = page.locator(f"head {name}").first.evaluate("e => e.href || e.src")
        kept = page.request.get(address).headers["cache-control"]
        assert {"public", "max-age=31536000", "immutable"} == set(kept.split(", ")), address
