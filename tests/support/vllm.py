"""vLLM models in tests: entries of the settings file, and the console's options to run them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.fakes.gpu.pynvml import TOTAL_BYTES
from tests.support.docker import FAKE_VLLM_IMAGE, DockerEngine
from tests.support.gpu import fake_driver
from tests.support.hub import TINY_MODEL, fill_cache

GPU_NAME = f"of_run_{os.getpid()}"
ON_GPU = {"gpu": GPU_NAME, "gpu_bytes": TOTAL_BYTES}
"""Options that put a fake vLLM on this run's fake GPU."""


def gpu_entry(model: str, *, required_gb: float = 60, **faults: object) -> str:
    """A `[[models]]` table for a model on the fake GPU of 80 GB, with the fake vLLM's faults."""
    fake = json.dumps({"load_seconds": 0.6, **ON_GPU, **faults})
    return (
        f'[[models]]\nid = "{model}"\nengine = "vllm"\nsource = "{model}"\nsize_gb = 0.05\n'
        f"required_gb = {required_gb}\n"
        f"[models.options]\nshm_gb = 0.064\nenvironment = {{ FAKE_VLLM = {json.dumps(fake)} }}\n"
    )


def on_gpu(docker: DockerEngine, folder: Path, *models: str) -> dict[str, object]:
    """A console's options for a machine with the fake GPU, whose Hugging Face cache holds these models already."""
    for model in models:
        fill_cache(folder / "hub", model, TINY_MODEL)
    return {
        "vllm_image": FAKE_VLLM_IMAGE,
        "docker_host": docker.host,
        "hub_cache_dir": folder / "hub",
        "vllm_cache_dir": folder / "compiled",
        "environment": {
            **fake_driver(),
            "FAKE_GPU": GPU_NAME,
            "HF_HUB_OFFLINE": "1",
        },
    }


def models_running(docker: DockerEngine) -> list[str]:
    """The models whose containers run."""
    return sorted(c["Labels"]["switchyard.model"] for c in docker.client.containers())
