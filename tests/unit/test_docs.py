"""The documentation keeps up with the code."""

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
    """Name and default stand in the README's table as they are in the code."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    default = Settings.model_fields[name].default
    text = ", ".join(default) if isinstance(default, tuple) else str(default)
    shown = "–" if default in (None, ()) else text.lower() if isinstance(default, bool) else text
    assert rows[0].split("|")[2].strip() == shown


def test_every_endpoint_is_in_the_api_documentation(tmp_path):
    """Method and path of each documented route appear in docs/api.md."""
    app = create_app(state_dir=tmp_path / "state", models_dir=tmp_path)
    text = (ROOT / "docs" / "api.md").read_text()
    app.extensions["switchyard"].close()
    for path, operations in openapi(app, "0")["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in text


def test_what_is_told_as_missing_is_missing(client):
    """Each call of the section about what is not there yet is refused: whoever adds one takes it off the list."""
    text = (ROOT / "docs" / "api.md").read_text()
    calls = re.findall(r"`(GET|POST|PUT|DELETE) (/\S+)`", text.partition("## Of the contract, not there yet")[2])
    assert len(calls) > 5
    for method, path in calls:
        answer = client.open(path.replace("{model_id}", "switchyard-mini"), method=method)
        assert answer.status_code in (404, 405), f"{method} {path} is there"
