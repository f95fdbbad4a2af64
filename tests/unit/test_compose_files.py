"""What compose.yaml and the files beside it promise, read as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from services.config import Settings

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("compose*.yaml"))
OF_THE_IMAGE = {"state_dir", "models_dir", "llamacpp_server", "ollama_binary", "models", "recommended"}
"""Settings that name what is in the image, or that only a settings file can hold."""
OF_THE_SOCKET = {"docker_host", "hub_cache_dir", "vllm_cache_dir"}
"""Settings that compose.docker.yaml makes."""


def services(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["services"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_published_beyond_this_machine_and_nobody_is_privileged(path):
    for service in services(path).values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert "privileged" not in service
        assert "cap_add" not in service


def test_every_service_comes_back_and_has_time_to_stop():
    for service in services(ROOT / "compose.yaml").values():
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"] == "30s"


def test_ollama_is_optional_and_the_app_is_not():
    found = services(ROOT / "compose.yaml")
    assert found["ollama"]["profiles"] == ["ollama"]
    assert "profiles" not in found["switchyard"]


def test_the_socket_is_only_given_by_the_file_that_says_so():
    giving = {
        path.name
        for path in FILES
        for service in services(path).values()
        if any("docker.sock" in volume for volume in service.get("volumes", ()))
    }
    assert giving == {"compose.docker.yaml"}


def test_every_setting_is_passed_on():
    """Bare names: they come from the shell or from `.env`, where they are set."""
    passed = set(services(ROOT / "compose.yaml")["switchyard"]["environment"])
    expected = {f"SWITCHYARD_{name.upper()}" for name in set(Settings.model_fields) - OF_THE_IMAGE - OF_THE_SOCKET}
    assert passed == expected | {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OLLAMA_BASE_URL", "OLLAMA_MODEL"}
