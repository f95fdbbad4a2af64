"""The documentation agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app import create_app
from blueprints.api.spec import openapi
from services.config import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(set(Settings.model_fields) - {"models", "recommended"}))
def test_every_setting_is_in_the_readme_with_its_default(name):
    """The README's table of settings has each name with its default in the code."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    default = Settings.model_fields[name].default
    text = ", ".join(default) if isinstance(default, tuple) else str(default)
    shown = "–" if default in (None, ()) else text.lower() if isinstance(default, bool) else text
    assert rows[0].split("|")[2].strip() == shown


def test_every_endpoint_is_in_the_api_documentation(tmp_path):
    """docs/api.md has the method and path of each route in the OpenAPI document."""
    app = create_app(state_dir=tmp_path / "state", models_dir=tmp_path)
    text = (ROOT / "docs" / "api.md").read_text()
    app.extensions["switchyard"].close()
    for path, operations in openapi(app, "0")["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in text


def test_calls_listed_as_not_implemented_are_refused(client):
    """Each call in the section about missing parts of the contract is refused: one that works has to leave the list."""
    text = (ROOT / "docs" / "api.md").read_text()
    calls = re.findall(r"`(GET|POST|PUT|DELETE) (/\S+)`", text.partition("## In the contract, not implemented yet")[2])
    assert calls
    for method, path in calls:
        answer = client.open(path.replace("{model_id}", "switchyard-mini"), method=method)
        assert answer.status_code in (404, 405), f"{method} {path} is implemented"


def test_relative_links_lead_to_files():
    """Every relative link of a documentation page leads to a file that exists."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests/README.md", ROOT / "tools/README.md"]
    pages.append(ROOT / "services/local_servers/README.md")
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    assert len(links) > 30
    assert [link for page, link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_decision_is_in_the_index_with_its_title():
    """docs/decisions/README.md lists each decision by its number, title and file."""
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    for path in sorted(folder.glob("0*.md")):
        number, title = re.match(r"# (\d+)\. (.*)", path.read_text()).groups()
        assert f"{number}. [{title}]({path.name})" in index
