"""Derives the container for a vLLM model. Pure.

Options of a listed model: `image`, `revision` (a branch, tag or commit on Hugging Face), `arguments` (added to `vllm
serve`), `environment`, `context_length`, `device` (a GPU's UUID, or `host` for the CPU build), `shm_gb`, `mounts`
(`[["/data/models", "/models"]]`, read-only), `sleep` (whether it may sleep instead of being stopped).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.engines.containers.port import MODEL_LABEL, ContainerSpec, Mount
from services.engines.port import HOST_DEVICE, Model
from services.sizes import GIB

PORT = 8000
OWNER_LABEL = "switchyard.owner"
HUB_CACHE = "/root/.cache/huggingface"
COMPILE_CACHE = "/root/.cache/vllm"
"""Paths in the container: vllm/vllm-openai runs as root, whose home has the caches of weights and compiled kernels."""
SLEEP_FLAG, SLEEP_SWITCH = "--enable-sleep-mode", "VLLM_SERVER_DEV_MODE"
SLEEPS_FROM = (0, 8, 5)
"""The first vLLM with /sleep, /wake_up and /is_sleeping, which it only offers in development mode."""
TAG_VERSION = re.compile(r":v?(\d+)\.(\d+)\.(\d+)")
LEAST_SHARE, MOST_SHARE = 0.02, 0.98
DEFAULT_SHARE = 0.92
"""The share of a GPU that vLLM 0.33 claims by default (0.9 before)."""
RUNTIME_BYTES = 3 * GIB
"""The device's context (about 1 GiB), and what profiling and graphs take (1 to 3 GiB)."""
CACHE_SHARE = 0.15
"""Space for the KV cache, relative to the weights, if the model's need is not declared."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Defaults for every model. `owner` identifies this Switchyard's containers among those of others.

    `environment` is set in every container: a token for gated models, and the flag for Hugging Face's offline mode.
    """

    image: str
    owner: str
    hub_cache: Path
    compile_cache: Path
    shm_bytes: int = 8 * GIB
    environment: Mapping[str, str] = field(default_factory=dict)
    sleep: bool = True


def spec_of(model: Model, settings: VllmSettings, *, device: str, share: float | None) -> ContainerSpec:
    """Return the container for a model. `share` is the part of its GPU's memory it may claim, None for the CPU build.

    vLLM claims its share whatever the model's size, and refuses to start unless that much is free.
    """
    options = model.options
    command = [model.source, "--served-model-name", model.id, "--host", "0.0.0.0", "--port", str(PORT)]
    if share is not None:
        command += ["--gpu-memory-utilization", f"{share:.3f}"]
    if options.get("revision"):
        command += ["--revision", str(options["revision"])]
    if options.get("context_length"):
        command += ["--max-model-len", str(options["context_length"])]
    image = str(options.get("image") or settings.image)
    environment = {**settings.environment, **_texts(options.get("environment"))}
    if device != HOST_DEVICE and options.get("sleep", settings.sleep) and can_sleep(image):
        command += [SLEEP_FLAG]
        environment[SLEEP_SWITCH] = "1"
    command += [str(argument) for argument in _list(options.get("arguments"))]
    return ContainerSpec(
        name=container_name(model.id, settings.owner),
        image=image,
        port=PORT,
        command=tuple(command),
        environment=environment,
        labels={MODEL_LABEL: model.id, OWNER_LABEL: settings.owner},
        mounts=(
            Mount(str(settings.hub_cache), HUB_CACHE),
            Mount(str(settings.compile_cache), COMPILE_CACHE),
            *(Mount(str(source), str(target), read_only=True) for source, target in _pairs(options.get("mounts"))),
        ),
        gpus=() if device == HOST_DEVICE else (device,),
        shm_bytes=int(float(str(options["shm_gb"])) * 1e9) if "shm_gb" in options else settings.shm_bytes,
    )


def can_sleep(image: str) -> bool:
    """Return whether an image's vLLM has a sleep mode. One whose tag has no version is assumed to be new."""
    version = TAG_VERSION.search(image)
    return version is None or tuple(int(part) for part in version.groups()) >= SLEEPS_FROM


def container_name(model_id: str, owner: str) -> str:
    """Return a valid container name (`[a-zA-Z0-9][a-zA-Z0-9_.-]+`), unique per model and owner."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", model_id).strip("-.")[:40]
    return f"switchyard-{stem}-{hashlib.sha256(f'{owner} {model_id}'.encode()).hexdigest()[:8]}"


def required_bytes(model: Model) -> int:
    """Estimate weights, cache and runtime of a model that was never loaded; 0 if its size is unknown."""
    if not model.size_bytes:
        return 0
    return int(model.size_bytes * (1 + CACHE_SHARE)) + RUNTIME_BYTES


def share_of(need_bytes: int, total_bytes: int) -> float:
    """Return the share that makes vLLM claim `need_bytes` of a device, rounded up to a thousandth."""
    if total_bytes <= 0:
        return MOST_SHARE
    return min(MOST_SHARE, max(LEAST_SHARE, (need_bytes * 1000 // total_bytes + 1) / 1000))


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def _pairs(value: object) -> list[tuple[object, object]]:
    return [(pair[0], pair[1]) for pair in _list(value) if isinstance(pair, (list, tuple)) and len(pair) == 2]


def _texts(value: object) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, Mapping) else {}
