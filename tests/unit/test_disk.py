"""What is still to come has to fit on the disk it goes to, with the margin left over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.downloads.disk import DiskCheck
from services.downloads.fetcher import DownloadError

GB = 10**9
sizes = st.integers(min_value=0, max_value=100 * GB)


def fits(left: int | None, free: int, margin: int, folder: Path | None = Path("/")) -> bool:
    try:
        DiskCheck({"ollama": lambda: folder}, margin_bytes=margin, free_bytes=lambda _: free).check("ollama", left)
    except DownloadError:
        return False
    return True


@settings(deadline=None)
@given(left=sizes, free=sizes, margin=sizes)
def test_what_fits_leaves_the_margin_free(left: int, free: int, margin: int) -> None:
    """Exactly when the rest and the margin fit, or nothing is left to come."""
    assert fits(left, free, margin) == (left == 0 or left + margin <= free)


def test_the_refusal_names_sizes_place_and_remedy() -> None:
    check = DiskCheck({"ollama": lambda: Path("/models")}, margin_bytes=GB, free_bytes=lambda _: 2 * GB)
    with pytest.raises(DownloadError) as error:
        check.check("ollama", 4_100_000_000)
    assert (error.value.code, error.value.may_resume) == ("disk_full", True)
    for words in ("4.1 GB", "2.0 GB", "/models", "1.0 GB", "disk_margin_gb", "Delete a model"):
        assert words in error.value.message


@pytest.mark.parametrize(("left", "folder"), [(None, Path("/")), (100 * GB, None)])
def test_what_nobody_knows_passes(left: int | None, folder: Path | None) -> None:
    """An unknown size, and files that go to another machine."""
    assert fits(left, 0, GB, folder)


def test_a_source_that_was_never_named_passes() -> None:
    DiskCheck({}, margin_bytes=GB, free_bytes=lambda _: pytest.fail("nothing to look at")).check("ollama", 100 * GB)


def test_a_folder_that_does_not_exist_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    """At the nearest one above that does."""
    asked: list[Path] = []

    def free_bytes(folder: Path) -> int:
        asked.append(folder)
        return shutil.disk_usage(folder).free

    DiskCheck({"ollama": lambda: tmp_path / "not" / "yet"}, margin_bytes=0, free_bytes=free_bytes).check("ollama", 1)
    assert asked == [tmp_path]


def test_a_disk_that_cannot_be_asked_stops_nothing() -> None:
    """The transfer itself will tell."""

    def refuse(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    DiskCheck({"ollama": lambda: Path("/")}, margin_bytes=GB, free_bytes=refuse).check("ollama", 100 * GB)
