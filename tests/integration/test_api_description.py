"""`/openapi.json` compared with the app: every documented endpoint behaves as described, under fuzzing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from tests.support.console import DEMO_MODELS, Console

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LEFT_OUT = {"/v1/events", "/api/restart-api"}
"""The first never ends, the second would restart the app under the others; both have their own tests."""
ENGINE_TROUBLE = {502, 503, 504}
"""Statuses that report an engine's failure; they are not failures of the app."""


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    folder = tmp_path_factory.mktemp("described")
    models = folder / "models"
    models.mkdir()
    shutil.copy(DEMO_MODELS / "switchyard-mini.gguf", models)
    console = Console(folder, models_dir=models, switch_rate_limit="100000/minute").start()
    yield console
    console.close()


def operations(console: Console) -> list[tuple[str, str]]:
    paths = console.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_every_endpoint_matches_its_description_under_fuzzing(described):
    """Schemathesis: no 500, no undocumented status or content type, for valid and invalid requests."""
    schema = schemathesis.openapi.from_url(f"{described.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path not in LEFT_OUT:
            _fuzz(operation)
    assert described.get("/readyz").status_code == 200


def _fuzz(operation: APIOperation) -> None:
    @SETTINGS
    @given(case=operation.as_strategy())
    def check(case: Case) -> None:
        response = case.call(timeout=30)
        if response.status_code not in ENGINE_TROUBLE:
            case.validate_response(
                response, checks=[not_a_server_error, status_code_conformance, content_type_conformance]
            )

    check()


def test_the_description_names_every_route_of_the_contract(described):
    """A route that disappears, or is never documented, fails here."""
    documented = set(operations(described))
    expected = {
        ("GET", "/v1/models/status"),
        ("POST", "/v1/models/switch"),
        ("GET", "/v1/models/switch"),
        ("DELETE", "/v1/models/switch"),
        ("GET", "/v1/models/switch/events"),
        ("POST", "/v1/models/switch/plan"),
        ("POST", "/v1/models/{model_id}/start"),
        ("POST", "/v1/models/{model_id}/stop"),
        ("POST", "/v1/models/{model_id}/restart"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model_id}"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/rerank"),
        ("POST", "/chat/completions"),
        ("GET", "/v1/events"),
        ("POST", "/api/switch-model"),
        ("GET", "/api/model-loading-status"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/openapi.json"),
    }
    assert expected <= documented


def test_the_docs_page_lists_every_endpoint(described):
    """`/docs` lists every documented endpoint."""
    page = described.get("/docs").text
    for method, path in operations(described):
        assert f"{method} {path}" in page


def test_events_report_every_change(described):
    """`/v1/events` sends the whole status at once, and again when a model changes."""
    with described.get("/v1/events", stream=True) as answer:
        told = (json.loads(line[6:]) for line in answer.iter_lines(decode_unicode=True) if line.startswith("data: "))
        assert "version" in next(told)
        requests.post(f"{described.url}/v1/models/switch?target_model=switchyard-mini", timeout=30)
        assert any(status["models"]["switchyard-mini"]["status"] == "running" for status in told)


def test_healthz_and_readyz(described):
    """The endpoints for supervisors."""
    assert described.get("/healthz").json()["status"] == "ok"
    assert described.get("/readyz").json() == {"status": "ready"}
