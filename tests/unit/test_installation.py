"""Installing the Python packages of the local servers, from a folder of wheels: no network."""

from __future__ import annotations

import os
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from flask import Flask

from services.engines.processes import ProcessRegistry
from services.engines.python_server.packages import Packages, python_in
from services.engines.supervisor import ServiceError
from services.providers.installation import Installation, Installer, PipProgress, cause_of_failure
from tests.support.console import wait_until

GB = 10**9


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, where pip looks for packages by its own environment variables."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_package.py", "")
        info = "tiny_package-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def servers(tmp_path: Path) -> Path:
    """A folder of servers that need the package of the wheel."""
    folder = tmp_path / "servers"
    folder.mkdir()
    (folder / "flux_service.py").touch()
    (folder / "requirements.txt").write_text("# what Flux needs\ntiny-package==1.0  # small\n")
    return folder


@pytest.fixture
def make_installer(tmp_path: Path, servers: Path) -> Iterator[Callable[..., Installer]]:
    made: list[Installer] = []

    def make(free_bytes: int = 100 * GB) -> Installer:
        made.append(
            Installer(
                Packages(servers, tmp_path / "state" / "env"),
                ProcessRegistry(tmp_path / "state"),
                margin_bytes=GB,
                free_bytes=lambda _folder: free_bytes,
            )
        )
        return made[-1]

    yield make
    for installer in made:
        installer.close()


def finished(installer: Installer) -> Installation:
    wait_until(lambda: installer.current is not None and installer.current.state != "running", "the end of it")
    assert installer.current is not None
    return installer.current


def leftovers(tmp_path: Path) -> list[str]:
    state = tmp_path / "state"
    return [path.name for path in state.iterdir() if path.name.startswith("env.")] + [
        path.name for path in (state / "processes").iterdir()
    ]


@pytest.mark.usefixtures("wheels")
def test_missing_packages_are_named_and_installed_with_one_call(
    make_app: Callable[..., Flask], servers: Path, tmp_path: Path
) -> None:
    """The start names them before anything else happens; after the installation they are there."""
    app = make_app(local_servers_dir=servers)
    client = app.test_client()
    refused = client.post("/api/providers/services/start", json={"service": "flux"})
    assert (refused.status_code, refused.get_json()["error"]) == (409, "packages_missing")
    assert "tiny-package==1.0" in refused.get_json()["message"]

    def flux() -> dict[str, object]:
        document: dict[str, object] = client.get("/api/providers/services/status").get_json()["services"]["flux"]
        return document

    assert (flux()["missing"], flux()["can_start"], flux()["can_install"]) == (["tiny-package==1.0"], False, True)
    begun = client.post("/api/providers/services/install", json={"service": "flux"})
    assert (begun.status_code, begun.get_json()["status"]) == (202, "installing")
    assert not flux()["can_install"]
    wait_until(lambda: flux()["installation"]["state"] != "running", "the end of it")  # type: ignore[index]
    job = flux()["installation"]
    assert isinstance(job, dict)
    assert (job["state"], job["percent"], job["error"]) == ("complete", 100, None), job
    assert (flux()["missing"], flux()["can_install"]) == ([], False)

    app.extensions["switchyard"].engines["flux"].supervisor.refresh()
    assert flux()["can_start"]
    env = tmp_path / "app-state" / "local-servers-env"
    assert python_in(env).exists()
    assert [path.name for path in env.parent.iterdir() if path.name.startswith("local-servers-env")] == [env.name]
    again = client.post("/api/providers/services/install", json={"service": "vision"})
    assert (again.status_code, again.get_json()["message"]) == (200, "Every package is installed")


@pytest.mark.usefixtures("wheels")
def test_a_failure_has_pips_own_cause_and_leaves_what_was_there(
    make_installer: Callable[..., Installer], servers: Path, tmp_path: Path
) -> None:
    (servers / "requirements.txt").write_text("no-such-package>=2\n")
    before = tmp_path / "state" / "env"
    before.mkdir(parents=True)
    (before / "mark").touch()
    installer = make_installer()
    assert installer.start().state == "running"
    job = finished(installer)
    assert job.state == "failed"
    assert "satisfies the requirement no-such-package>=2" in (job.error or "")
    assert "ERROR" in job.log_tail
    assert (before / "mark").exists()
    assert leftovers(tmp_path) == []
    installer.dismiss()
    assert installer.current is None


def test_an_installation_can_be_cancelled_and_is_found_after_a_crash(
    make_installer: Callable[..., Installer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip waits for an index that never answers; the next run of the app ends it, and nothing half-made is used."""
    with closing(socket.create_server(("127.0.0.1", 0))) as index:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        monkeypatch.delenv("PIP_NO_INDEX", raising=False)
        installer = make_installer()
        installer.start()
        asked, _ = index.accept()
        with asked:
            assert installer.start() is installer.current, "a second click joins it"
            packages = Packages(tmp_path / "servers", tmp_path / "state" / "env")
            assert (packages.missing(), python_in(packages.env).exists()) == (("tiny-package==1.0",), False)
            (record,) = (tmp_path / "state" / "processes").glob("*.json")
            (ended,) = ProcessRegistry(tmp_path / "state").end_leftovers()
            assert ended == int(record.stem)
            assert finished(installer).state == "failed"
            assert not psutil.pid_exists(ended)
        installer.start()
        asked, _ = index.accept()
        with asked:
            cancelled = installer.cancel()
        assert cancelled is not None
        assert (cancelled.state, cancelled.error) == ("cancelled", None)
    assert leftovers(tmp_path) == []


def test_the_disk_space_is_checked_first(make_installer: Callable[..., Installer], servers: Path) -> None:
    """PyTorch takes gigabytes; nothing has begun when it can't fit."""
    (servers / "requirements.txt").write_text("torch==2.9.0\n")
    installer = make_installer(free_bytes=8 * GB)
    with pytest.raises(ServiceError, match=r"only 8\.0 GB are free") as caught:
        installer.start()
    assert caught.value.code == "disk_full"
    assert installer.current is None


def test_without_the_list_of_packages_nothing_is_installed(make_app: Callable[..., Flask]) -> None:
    answer = make_app().test_client().post("/api/providers/services/install", json={"service": "flux"})
    assert (answer.status_code, answer.get_json()["error"]) == (409, "packages_missing")
    assert "local_servers_dir" in answer.get_json()["message"]


@pytest.mark.parametrize("action", ["start", "stop", "install"])
def test_a_service_on_another_machine_is_left_to_it(make_app: Callable[..., Flask], action: str) -> None:
    """`.invalid` never resolves, so no request reaches another server."""
    client = make_app(flux_api_url="http://flux.invalid:8001").test_client()
    answer = client.post(f"/api/providers/services/{action}", json={"service": "flux"})
    assert (answer.status_code, answer.get_json()["error"]) == (409, "remote_service")
    flux = client.get("/api/providers/services/status").get_json()["services"]["flux"]
    assert (flux["local"], flux["can_start"], flux["can_install"], flux["missing"]) == (False, False, False, [])
    assert "flux-schnell" not in client.get("/v1/models/status").get_json()["models"]


def test_ollama_is_not_installed_this_way(make_app: Callable[..., Flask]) -> None:
    answer = make_app().test_client().post("/api/providers/services/install", json={"service": "ollama"})
    assert (answer.status_code, answer.get_json()["error"]) == (422, "not_installable")


OUTPUT = """\
Collecting torch==2.9.0 (from -r requirements.txt (line 1))
  Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)
  Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl (899.8 MB)
Progress 449900000 of 899800000
"""


def test_progress_follows_pips_output() -> None:
    """Of any version: newer ones report bytes, older ones the size of each file when it begins."""
    progress = PipProgress(2 * GB)
    for line in OUTPUT.splitlines():
        progress.feed(line)
    assert progress.message == "Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl (450 of 900 MB)"
    assert (progress.completed_bytes, progress.percent) == (449_900_000, 22)
    progress.feed("  Using cached pillow-11.0-cp311.whl (4.2 MB)")
    assert progress.completed_bytes == 899_800_000
    progress.feed("Installing collected packages: pillow, torch")
    assert (progress.message, progress.percent) == ("Installing 2 packages", 95)
    assert progress.completed_bytes == 904_000_000


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("The virtual environment was not created successfully because ensurepip is not\navailable.", "python3-venv"),
        ("WARNING: Retrying ... NewConnectionError('... Failed to establish a new connection')", "can't be reached"),
        ("ERROR: Hash mismatch.\nERROR: more", "Hash mismatch."),
        ("Traceback\nKeyError: 'x'", "it ended with exit code 2 (KeyError: 'x')."),
        ("", "it ended with exit code 2."),
    ],
)
def test_causes_are_put_in_words(said: str, words: str) -> None:
    assert words in cause_of_failure(said, "ended with exit code 2")


def test_requirements_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    """Options, comments and requirements of other systems are left out; versions are compared."""
    (tmp_path / "requirements.txt").write_text(
        "--extra-index-url https://example.org/simple\n\n# a comment\npytest>=2\npytest<1  # too new here\n"
        "pywin32 ; sys_platform == 'win32'\nPyTest_Timeout>0\nnot a requirement!\n"
    )
    assert Packages(tmp_path, tmp_path / "env").missing() == ("pytest<1",)
    os.remove(tmp_path / "requirements.txt")
    assert Packages(tmp_path, tmp_path / "env").missing() == (f"the file {tmp_path}/requirements.txt",)
