"""Fixtures of the tests on the real vLLM. `make test-vllm` runs them; `make test` leaves them out."""

from __future__ import annotations

import pytest

from tests.support.docker import DockerEngine
from tests.support.real_vllm import import_real_vllm


@pytest.fixture(scope="session")
def docker(docker: DockerEngine) -> DockerEngine:
    """The test run's Docker engine, which also has the image of the real vLLM."""
    import_real_vllm(docker.client)
    return docker
