"""A base image for builds without internet: the contents of python:3.11-slim, made of this machine's files.

Python and pip are at the same paths as in the official image. Debian packages that a build may install are included but
not installed; the image's `apt-get` unpacks them, and knows no others.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pip
from docker import APIClient

from tests.support.docker import libraries_of, program

PROGRAMS = ("cat", "chmod", "cp", "id", "install", "ln", "ls", "mkdir", "rm", "sh", "sleep", "stat", "useradd")
LIBRARIES = ("libc6", "libgcc-s1", "libstdc++6", "zlib1g")
"""Debian packages with the libraries that slim images have and wheels rely on."""
PACKAGES = ("libgomp1", "tini")
"""Debian packages that slim images don't have; the image's `apt-get` installs them."""
LEFT_OUT = re.compile(r"tests?|site-packages|config-.*|idlelib|tkinter|ensurepip|lib2to3|.*\.opt-[12]\.pyc")
APT_GET = '''\
#!/usr/local/bin/python3
"""Install packages that are packed in the image; fail for any other, as apt-get does."""
import sys, tarfile
if "install" in sys.argv:
    for name in (word for word in sys.argv[2:] if not word.startswith("-")):
        with tarfile.open(f"/packages/{name}.tar") as package:
            package.extractall("/")
'''
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/shadow": "root:*:19000:0:99999:7:::\n",
    "etc/login.defs": "UID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\nUSERGROUPS_ENAB yes\n",
}


def import_base(client: APIClient, repository: str, tag: str) -> None:
    """Make the image. The Debian packages must be installed on this machine; `tools/ensure_docker.sh` does that."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
            _pack(tar)
        file.flush()
        # As in the official image. The library path is needed because the loader has no cache of /usr/local/lib here.
        changes = ["ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "ENV LD_LIBRARY_PATH=/usr/local/lib"]
        client.import_image_from_file(file.name, repository=repository, tag=tag, changes=changes)


def _pack(tar: tarfile.TarFile) -> None:
    for folder, mode in (("tmp", 0o1777), ("root", 0o700), ("etc", 0o755), ("usr/sbin", 0o755)):
        _add_folder(tar, folder, mode)
    for path, text in ACCOUNTS.items():
        _add(tar, path, text.encode(), 0o644)
    python, library = Path(sys.executable).resolve(), Path(os.__file__).parent
    tar.add(library, "usr/local/lib/python3.11", filter=_needed)
    tar.add(Path(pip.__file__).parent, "usr/local/lib/python3.11/site-packages/pip", filter=_needed)
    tar.add(python, "usr/local/bin/python3.11")
    for name in ("python", "python3"):
        _add_link(tar, f"usr/local/bin/{name}", "python3.11")
    programs = {name: Path(program(name)) for name in PROGRAMS}
    for name, found in programs.items():
        tar.add(found, f"bin/{name}")
    extensions = [path for path in library.glob("lib-dynload/*.so") if "tkinter" not in path.name]
    for file in {*libraries_of(python, *programs.values(), *extensions), *_files(*LIBRARIES)}:
        tar.add(file, "usr/local/lib/" + file.name if file.is_relative_to(sys.base_prefix) else str(file))
    _add(tar, "usr/bin/apt-get", APT_GET.encode(), 0o755)
    for name in PACKAGES:
        _add(tar, f"packages/{name}.tar", _package(name), 0o644)


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if LEFT_OUT.fullmatch(Path(entry.name).name) else entry


def _package(name: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in _files(name):
            tar.add(path)
    return packed.getvalue()


def _files(*packages: str) -> list[Path]:
    """The programs and libraries of Debian packages installed on this machine, without documentation."""
    listed = subprocess.run(["dpkg", "--listfiles", *packages], capture_output=True, text=True, timeout=30, check=True)
    paths = [Path(line) for line in listed.stdout.splitlines() if line.startswith("/")]
    return [path for path in paths if not path.is_dir() and not {"share", "gconv"} & set(path.parts)]


def _add(tar: tarfile.TarFile, path: str, content: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def _add_folder(tar: tarfile.TarFile, path: str, mode: int) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


def _add_link(tar: tarfile.TarFile, path: str, target: str) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    tar.addfile(entry)
