"""The fetcher for the Hugging Face hub: the real huggingface_hub in its real child process, and a fake hub."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from services.cancellation import Cancelled, CancelToken
from services.downloads.fetcher import DownloadError, FileProgress
from services.downloads.huggingface.errors import explain
from services.downloads.huggingface.fetcher import HuggingFaceFetcher
from services.downloads.huggingface.names import parse
from services.downloads.huggingface.process import HubProcess
from services.downloads.huggingface.redirects import BLOB, RedirectGuard
from services.engines.processes import ProcessRegistry
from tests.fakes.hub import COMMIT, FakeHub, Repo
from tests.support.console import DEMO_MODELS, ROOT, free_port, wait_until
from tests.support.hub import RETRY_PAUSE, Fetch, hub_environment, hub_running
from tests.support.stopwatch import Stopwatch

MODEL = (DEMO_MODELS / "switchyard-mini.gguf").read_bytes()
PARTS = {f"q8/big-0000{number}-of-00003.gguf": bytes([number]) * 100_000 for number in (1, 2, 3)}
TOKEN = "hf_secretForTests"
REPOS = {
    "yard/mini": Repo({"README.md": b"Hello", "mini.gguf": MODEL}),
    "yard/split": Repo({**PARTS, "mmproj-F16.gguf": b"projector"}),
    "yard/many": Repo({f"m-{tag}.gguf": tag.encode() * 10_000 for tag in ("Q2_K", "Q4_K_M", "Q8_0")}),
    "yard/choice": Repo({f"m-{tag}.gguf": tag.encode() * 1_000 for tag in ("Q2_K", "Q8_0")}),
    "yard/plain": Repo({"small.gguf": b"GGUF in git itself" * 100}, lfs=False),
    "yard/gated": Repo({"mini.gguf": MODEL}, gated=TOKEN),
    "yard/climber": Repo({"../../climbed.gguf": b"x" * 100}),
    "yard/huge": Repo({"huge.gguf": b"x"}, sizes={"huge.gguf": 10**18}),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with hub_running(REPOS, monkeypatch, tmp_path / "home") as hub:
        yield hub


@pytest.fixture
def registry(tmp_path: Path) -> ProcessRegistry:
    return ProcessRegistry(tmp_path / "state")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def fetcher(hub: FakeHub, models: Path, registry: ProcessRegistry) -> HuggingFaceFetcher:
    process = HubProcess(registry, hosts=[hub.cdn_host], stall_seconds=20, retry_pause=RETRY_PAUSE)
    return HuggingFaceFetcher(models, process)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def children_of_this_process() -> list[str]:
    """The command lines of running transfers."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            found.append(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return [line for line in found if "huggingface.child" in line]


def test_a_model_is_downloaded_to_where_the_engine_finds_it(
    hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path
) -> None:
    fetch = Fetch(fetcher, "yard/mini").result()

    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}
    assert fetch.phases() == ["resolving", "downloading", "verifying", "writing"]
    assert [seen.expected_bytes for seen in fetch.seen if seen.expected_bytes is not None] == [len(MODEL)]
    assert fetch.seen[1].parts == {"mini.gguf": FileProgress(0, len(MODEL))}
    assert fetch.arrived("mini.gguf") == len(MODEL)
    assert {request.path.split("/")[1] for request in hub.requests_to("hub")} == {"api", "yard"}
    assert f"/yard/mini/resolve/{COMMIT}/mini.gguf" in [request.path for request in hub.requests_to("hub")]


def test_all_parts_of_a_split_model_are_downloaded(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    fetch = Fetch(fetcher, "yard/split").result()

    assert files_below(models) == {f"yard/split/{path}": content for path, content in PARTS.items()}
    assert fetch.seen[1].parts == {path: FileProgress(0, 100_000) for path in PARTS}
    assert fetch.seen[1].expected_bytes == 300_000
    assert len(hub.requests_to("cdn")) == 3


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("yard/many", "m-Q4_K_M.gguf"),
        ("yard/many/m-Q2_K.gguf", "m-Q2_K.gguf"),
        ("yard/many:q8_0@main", "m-Q8_0.gguf"),
        ("yard/plain", "small.gguf"),
    ],
)
def test_names_select_their_file(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path, name: str, file: str) -> None:
    Fetch(fetcher, name).result()

    repo = name.partition(":")[0].removesuffix(f"/{file}")
    assert files_below(models) == {f"{repo}/{file}": hub.repos[repo].files[file]}


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("yard/choice", "choose_file", "yard/choice/m-Q2_K.gguf, yard/choice/m-Q8_0.gguf"),
        ("yard/nothing", "unknown_model", "Check the spelling; if it is private, set HF_TOKEN"),
        ("yard/mini/other.gguf", "unknown_model", "yard/mini/mini.gguf"),
        ("yard/mini@gone", "unknown_model", "no revision gone"),
        ("yard/climber", "unsafe_path", "outside of the models folder"),
        ("yard/huge", "disk_full", "Make room"),
        ("yard/gated", "access_denied", "Accept the licence on the model's page and set HF_TOKEN"),
    ],
)
def test_a_failed_download_is_explained_and_leaves_nothing(
    hub: FakeHub, fetcher: HuggingFaceFetcher, tmp_path: Path, name: str, code: str, words: str
) -> None:
    failure = Fetch(fetcher, name).failure()

    assert failure.code == code
    assert words in failure.message
    assert hub.sent == 0
    assert list(tmp_path.rglob("*.gguf*")) == []


def test_an_unknown_repository_is_unknown_with_a_token_too(
    hub: FakeHub, fetcher: HuggingFaceFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub answers 401 without a token and 404 with one."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Fetch(fetcher, "yard/nothing").failure().code == "unknown_model"
    assert hub.requests[-1].authorization == f"Bearer {TOKEN}"


def test_the_token_is_sent_to_the_hub_only(
    hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no argument, log or other file, and the CDN doesn't get it."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert Fetch(fetcher, "yard/gated").failure().code == "access_denied"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.bytes_per_second = 4_000_000
    hub.faults.cut_after, hub.faults.cuts = 300_000, 1
    fetch = Fetch(fetcher, "yard/gated")
    wait_until(children_of_this_process, "the child to run")
    lines = children_of_this_process()
    fetch.result()

    assert files_below(models) == {"yard/gated/mini.gguf": MODEL}
    assert lines
    assert TOKEN not in " ".join(lines)
    written = {name: content for name, content in files_below(tmp_path).items() if TOKEN.encode() in content}
    assert written == {}
    assert hub.requests[-1].server == "cdn"
    assert {request.authorization for request in hub.requests_to("cdn")} == {None}


def test_an_interrupted_transfer_continues(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    hub.faults.cut_after, hub.faults.cuts = 400_000, 2
    Fetch(fetcher, "yard/mini").result()

    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}
    starts = [int(re.sub(r"\D", "", request.range or "0")) for request in hub.requests_to("cdn")]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert 0 < starts[1] < starts[2]
    assert hub.sent <= len(MODEL) + 2 * 65_536  # only the bytes in transit were sent twice


def test_a_server_without_ranges_sends_the_file_again(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    hub.faults.cut_after, hub.faults.cuts, hub.faults.refuse_ranges = 400_000, 1, True
    Fetch(fetcher, "yard/mini").result()

    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}
    assert hub.requests_to("cdn")[1].range is not None


def test_a_lasting_interruption_fails_and_a_retry_continues(
    hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path
) -> None:
    hub.faults.bytes_per_second = 2_000_000
    fetch = Fetch(fetcher, "yard/mini")
    wait_until(lambda: fetch.arrived("mini.gguf") > 200_000, "some bytes")
    hub.faults.cut_after = 0
    hub.faults.statuses = [503] * 20
    failure = fetch.failure()
    assert (failure.code, failure.may_resume) == ("hub_unreachable", True)
    assert not list(models.rglob("*.gguf"))

    hub.faults.cut_after, hub.faults.statuses, hub.faults.bytes_per_second = None, [], None
    asked = len(hub.requests)
    again = Fetch(fetcher, "yard/mini").result()
    kept = again.seen[1].parts["mini.gguf"].completed
    assert kept > 200_000
    assert hub.requests[asked:][-1].range == f"bytes={kept}-"
    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}


def test_a_single_server_error_is_retried(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    hub.faults.statuses = [503]
    Fetch(fetcher, "yard/mini").result()
    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}


def test_an_abort_stops_within_a_second_and_the_next_fetch_continues(
    hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path
) -> None:
    hub.faults.bytes_per_second = 400_000
    fetch = Fetch(fetcher, "yard/mini")
    wait_until(lambda: fetch.arrived("mini.gguf") > 100_000, "some bytes")
    watch = Stopwatch()
    fetch.token.cancel()
    with pytest.raises(Cancelled):
        fetch.result()
    assert watch.waited < 1.0
    assert children_of_this_process() == []
    arrived = sum(len(content) for content in files_below(models).values())
    assert arrived > 100_000
    assert not list(models.rglob("*.gguf"))

    hub.faults.bytes_per_second = None
    again = Fetch(fetcher, "yard/mini").result()
    assert again.seen[1].parts == {"mini.gguf": FileProgress(arrived, len(MODEL))}
    assert hub.requests[-1].range == f"bytes={arrived}-"
    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}


def test_bytes_are_reported_at_least_four_times_a_second(hub: FakeHub, fetcher: HuggingFaceFetcher) -> None:
    hub.faults.bytes_per_second = 900_000
    fetch = Fetch(fetcher, "yard/mini").result()

    amounts = [seen.parts["mini.gguf"].completed for seen in fetch.seen if "mini.gguf" in seen.parts]
    assert amounts == sorted(amounts)
    assert len(set(amounts)) >= 4 * int(len(MODEL) / 900_000)


def test_an_aborted_fetch_starts_nothing(hub: FakeHub, fetcher: HuggingFaceFetcher) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        fetcher.fetch("yard/mini", lambda _: None, token)
    assert hub.requests == []


def test_complete_files_are_not_downloaded_again(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    Fetch(fetcher, "yard/mini").result()
    hub.requests.clear()
    again = Fetch(fetcher, "yard/mini").result()

    assert [request.path for request in hub.requests] == ["/api/models/yard/mini"]
    assert again.seen[-1].parts == {"mini.gguf": FileProgress(len(MODEL), len(MODEL))}
    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}


def test_a_file_of_another_size_is_replaced(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    Fetch(fetcher, "yard/mini").result()
    hub.repos["yard/mini"] = Repo({"mini.gguf": b"a new version"})
    Fetch(fetcher, "yard/mini").result()
    assert files_below(models) == {"yard/mini/mini.gguf": b"a new version"}


def test_partial_data_of_another_version_is_not_used(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    hub.faults.bytes_per_second = 400_000
    fetch = Fetch(fetcher, "yard/mini")
    wait_until(lambda: fetch.arrived("mini.gguf") > 0, "some bytes")
    fetch.token.cancel()
    with pytest.raises(Cancelled):
        fetch.result()
    hub.faults.bytes_per_second = None
    hub.repos["yard/mini"] = Repo({"mini.gguf": MODEL[::-1]})
    Fetch(fetcher, "yard/mini").result()
    assert files_below(models) == {"yard/mini/mini.gguf": MODEL[::-1]}


@pytest.mark.parametrize("repo", ["yard/mini", "yard/plain"])
def test_corrupt_files_are_detected_and_deleted(
    hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path, repo: str
) -> None:
    """By LFS' SHA-256, and by git's id for a file outside of LFS."""
    hub.faults.flip = True
    assert Fetch(fetcher, repo).failure().code == "digest_mismatch"
    assert files_below(models) == {}

    hub.faults.flip = False
    Fetch(fetcher, repo).result()
    assert list(files_below(models).values()) == [list(REPOS[repo].files.values())[-1]]


def test_more_bytes_than_announced_are_refused(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    hub.repos["yard/liar"] = Repo({"liar.gguf": MODEL}, sizes={"liar.gguf": 1_000})
    assert Fetch(fetcher, "yard/liar").failure().code == "digest_mismatch"
    assert files_below(models) == {}


def test_a_hub_that_is_down_is_named(
    hub: FakeHub, fetcher: HuggingFaceFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    failure = Fetch(fetcher, "yard/mini").failure()
    assert (failure.code, failure.may_resume) == ("hub_unreachable", True)
    assert "HF_ENDPOINT" in failure.message
    assert hub.requests == []


def test_a_web_page_instead_of_the_hub_is_an_error(hub: FakeHub, fetcher: HuggingFaceFetcher) -> None:
    hub.faults.login_page = True
    failure = Fetch(fetcher, "yard/mini").failure()
    assert failure.code == "hub_error"
    assert "whether the network asks for a login" in failure.message


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_file_is_not_requested_from_this_machine_or_its_network(
    hub: FakeHub, models: Path, registry: ProcessRegistry, scheme: str
) -> None:
    """Redirects of a file to loopback, by name, number or address, are refused before anything is sent."""
    fetcher = HuggingFaceFetcher(models, HubProcess(registry, retry_pause=RETRY_PAUSE))
    port = hub.cdn_host.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254"):
        hub.faults.cdn = f"{scheme}://{host}:{port}"
        failure = Fetch(fetcher, "yard/mini").failure()
        assert failure.code == "redirect_refused", host
        assert "download_hosts" in failure.message
    assert hub.requests_to("cdn") == []


def test_a_file_may_come_from_a_public_host_without_the_token() -> None:
    """For example the hub's CDN, over HTTPS; plain HTTP, and requests other than for files, are refused."""
    guard = RedirectGuard("https://huggingface.co", ["registry.lan:5000"])
    token = {"Authorization": f"Bearer {TOKEN}"}

    def sent(url: str, **extensions: bool) -> bool:
        """Whether the token is sent. Raises DownloadError."""
        request = httpx2.Request("GET", url, headers=token, extensions=extensions)
        guard(request)
        return "Authorization" in request.headers

    assert sent("https://huggingface.co/api/models/a/b")
    assert not sent("https://1.1.1.1/signed", blob=True)
    assert not sent("http://registry.lan:5000/api/models/a/b")
    for url, extensions in (
        ("https://1.1.1.1/api", {}),
        ("http://1.1.1.1/signed", BLOB),
        ("http://huggingface.co/api/models/a/b", {}),
        ("https://huggingface.co:8443/a", {}),
    ):
        with pytest.raises(DownloadError):
            sent(url, **extensions)


def test_a_repository_is_listed_by_the_hub_only(hub: FakeHub, fetcher: HuggingFaceFetcher) -> None:
    """Only files may be elsewhere: listing a repository follows no redirect to another host, not even over HTTPS."""
    for place in ("https://example.com/api/models/yard/mini", "http://127.0.0.1:9/"):
        hub.faults.moved = place
        assert Fetch(fetcher, "yard/mini").failure().code == "redirect_refused"
    hub.faults.moved = "/yard/mini"  # a renamed repository, on the hub itself, which has no such page here
    assert Fetch(fetcher, "yard/mini").failure().code == "unknown_model"


def test_a_silent_transfer_is_stalled(hub: FakeHub, models: Path, registry: ProcessRegistry) -> None:
    hub.faults.hang_after = 100_000
    fetcher = HuggingFaceFetcher(models, HubProcess(registry, hosts=[hub.cdn_host], stall_seconds=1.5))
    failure = Fetch(fetcher, "yard/mini").failure()
    assert (failure.code, failure.may_resume) == ("stalled", True)
    assert children_of_this_process() == []
    assert sum(len(content) for content in files_below(models).values()) > 0


def test_a_crash_of_the_child_is_an_error_and_the_next_fetch_continues(
    hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path, tmp_path: Path
) -> None:
    hub.faults.bytes_per_second = 400_000
    fetch = Fetch(fetcher, "yard/mini")
    wait_until(lambda: fetch.arrived("mini.gguf") > 0, "some bytes")
    (record,) = (tmp_path / "state" / "processes").glob("*.json")
    os.kill(int(record.stem), signal.SIGKILL)
    failure = fetch.failure()
    assert (failure.code, failure.may_resume) == ("interrupted", True)
    assert "was ended by SIGKILL" in failure.message
    assert not record.exists()

    hub.faults.bytes_per_second = None
    Fetch(fetcher, "yard/mini").result()
    assert hub.requests[-1].range is not None
    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}


def test_a_second_download_of_the_same_file_is_refused(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    hub.faults.bytes_per_second = 400_000
    first = Fetch(fetcher, "yard/mini")
    wait_until(lambda: first.arrived("mini.gguf") > 0, "some bytes")
    assert Fetch(fetcher, "yard/mini/mini.gguf").failure().code == "busy"
    fetcher.discard("yard/mini")
    hub.faults.bytes_per_second = None
    first.result()
    assert files_below(models) == {"yard/mini/mini.gguf": MODEL}


def test_discarding_deletes_only_partial_data(hub: FakeHub, fetcher: HuggingFaceFetcher, models: Path) -> None:
    Fetch(fetcher, "yard/many:Q2_K").result()
    hub.faults.bytes_per_second, hub.faults.hang_after = 20_000, 4_096
    for tag in ("Q4_K_M", "Q8_0"):
        before = sum(map(len, files_below(models).values()))
        fetch = Fetch(fetcher, f"yard/many:{tag}")
        wait_until(lambda: sum(map(len, files_below(models).values())) > before, "some bytes")  # noqa: B023
        fetch.token.cancel()
        with pytest.raises(Cancelled):
            fetch.result()
    fetcher.discard("yard/many:Q4_K_M")
    left = [path.name for path in models.rglob("*") if path.is_file()]
    assert sorted(name.partition(".")[0] for name in left) == ["m-Q2_K", "m-Q8_0"]
    fetcher.discard("yard/many")
    assert list(files_below(models)) == ["yard/many/m-Q2_K.gguf"]

    (models / "yard/many/m-Q2_K.gguf").unlink()
    fetcher.discard("yard/many")
    fetcher.discard("yard/many")
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b/../c.gguf", "--help"])
def test_a_bad_name_is_refused_before_anything_runs(fetcher: HuggingFaceFetcher, models: Path, name: str) -> None:
    for act in (fetcher.check_name, fetcher.discard, lambda name: fetcher.fetch(name, lambda _: None, CancelToken())):
        with pytest.raises(DownloadError) as caught:
            act(name)
        assert caught.value.code == "invalid_name"
    assert not models.exists()


def test_an_unwritable_models_folder_is_an_error(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    fetcher = HuggingFaceFetcher(tmp_path / "file" / "models", HubProcess())
    failure = Fetch(fetcher, "yard/mini").failure()
    assert failure.code == "disk_error"
    assert hub.sent == 0


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (5, "disk_error")]
)
def test_a_disk_failure_during_a_transfer_is_an_error(number: int, code: str) -> None:
    """Directly with the child's error messages: the test can't fill a disk."""
    failure = explain(OSError(number, os.strerror(number)), parse("a/b"))
    assert failure is not None
    assert (failure.code, failure.may_resume) == (code, True)


PARENT = """
import os, sys
from pathlib import Path
{patch}
from services.cancellation import Cancelled, CancelToken
from services.downloads.huggingface.process import HubProcess
from services.downloads.huggingface.fetcher import HuggingFaceFetcher
from services.engines.processes import ProcessRegistry
folder = Path(sys.argv[1])
token = CancelToken()
def report(seen):
    for path, part in seen.parts.items():
        print(part.completed, flush=True)
        if {stop} and part.completed > 100_000:
            token.cancel()
try:
    process = HubProcess(ProcessRegistry(folder / "state"), hosts=[os.environ["SWITCHYARD_DOWNLOAD_HOSTS"]])
    HuggingFaceFetcher(folder / "models", process).fetch("yard/mini", report, token)
except Cancelled:
    print("aborted", flush=True)
    sys.exit("huggingface_hub" in sys.modules)
"""


def start_parent(hub: FakeHub, folder: Path, patch: str = "", stop: bool = False) -> subprocess.Popen[str]:
    """A program that downloads like the app, in a process that can be killed."""
    return subprocess.Popen(
        [sys.executable, "-c", PARENT.format(patch=patch, stop=stop), str(folder)],
        cwd=ROOT,
        env={**os.environ, **hub_environment(hub, folder / "home")},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_child_ends_when_the_app_is_killed(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.bytes_per_second = 100_000
    with start_parent(hub, tmp_path) as parent:
        assert parent.stdout is not None
        while int(parent.stdout.readline()) == 0:
            pass
        (record,) = (tmp_path / "state" / "processes").glob("*.json")
        child = psutil.Process(json.loads(record.read_text())["pid"])
        parent.kill()
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child to end", 3)


def test_it_works_under_gevent_and_keeps_the_library_out_of_the_app(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.bytes_per_second = 400_000
    with start_parent(hub, tmp_path, "from gevent import monkey; monkey.patch_all()", stop=True) as parent:
        said, _ = parent.communicate(timeout=20)
    assert said.splitlines()[-1] == "aborted"
    assert parent.returncode == 0
