"""The rules for compose.yaml and the files beside it, read as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from services.config import Settings

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("compose*.yaml"))
SET_BY_IMAGE = {"state_dir", "models_dir", "llamacpp_server", "ollama_binary", "models", "recommended"}
"""Settings fixed by the image, or only possible in a settings file."""
SET_WITH_SOCKET = {"docker_host", "hub_cache_dir", "vllm_cache_dir"}
"""Settings that compose.docker.yaml sets."""


def services(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["services"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_port_is_public_and_no_container_is_privileged(path):
    for service in services(path).values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert "privileged" not in service
        assert "cap_add" not in service


def test_every_service_restarts_and_has_time_to_stop():
    for service in services(ROOT / "compose.yaml").values():
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"] == "30s"


def test_ollama_is_optional_and_the_app_is_not():
    found = services(ROOT / "compose.yaml")
    assert found["ollama"]["profiles"] == ["ollama"]
    assert "profiles" not in found["switchyard"]


def test_only_compose_docker_yaml_mounts_the_docker_socket():
    giving = {
        path.name
        for path in FILES
        for service in services(path).values()
        if any("docker.sock" in volume for volume in service.get("volumes", ()))
    }
    assert giving == {"compose.docker.yaml"}


def test_every_setting_is_passed_on():
    """As bare names: the values come from the shell or from `.env`."""
    passed = set(services(ROOT / "compose.yaml")["switchyard"]["environment"])
    expected = {f"SWITCHYARD_{name.upper()}" for name in set(Settings.model_fields) - SET_BY_IMAGE - SET_WITH_SOCKET}
    assert passed == expected | {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OLLAMA_BASE_URL", "OLLAMA_MODEL"}
