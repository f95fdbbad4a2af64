"""The `back` parameter leads only to paths of this server."""

from __future__ import annotations

import re

import pytest

from blueprints.pages import done

ELSEWHERE = ["/\\evil.example", "//evil.example", "/\t/evil.example", "https://evil.example", "javascript:alert(1)", ""]
MODEL = "switchyard-mini"


@pytest.mark.parametrize("back", ELSEWHERE)
def test_no_address_of_another_site_becomes_a_link_or_a_field(client, back):
    """Browsers read a backslash as a slash and skip tabs: `/\\evil.example` is another site's address."""
    page = client.get("/models/plan", query_string={"target": MODEL, "back": back}).get_data(as_text=True)
    assert "evil" not in page
    assert re.findall(r'<a class="button" href="([^"]*)"', page) == ["/models"]
    assert 'name="back" value="/models"' in page


@pytest.mark.parametrize("back", ELSEWHERE)
def test_no_form_redirects_to_another_site(app, back):
    """For each form with a `back` field."""
    assert _way_back(app, back) == "/"


def test_a_path_of_ours_is_kept(app, client):
    """With its query and fragment."""
    page = client.get("/models/plan", query_string={"target": MODEL, "back": "/models?checked=yes#downloads"})
    assert 'href="/models?checked=yes#downloads"' in page.get_data(as_text=True)
    assert _way_back(app, "/chats/1#latest") == "/chats/1#latest"


def _way_back(app, back):
    """The redirect target of a form that was sent with `back`."""
    with app.test_request_context("/models/dismiss", method="POST", data={"back": back}):
        return done().location
