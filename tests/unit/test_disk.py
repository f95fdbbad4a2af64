"""Checking that the rest of a download fits on its disk, with the margin left free."""

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
def test_a_download_must_leave_the_margin_free(left: int, free: int, margin: int) -> None:
    """It fits exactly if the remaining bytes and the margin fit, or nothing remains."""
    assert fits(left, free, margin) == (left == 0 or left + margin <= free)


def test_the_error_names_sizes_folder_and_remedy() -> None:
    check = DiskCheck({"ollama": lambda: Path("/models")}, margin_bytes=GB, free_bytes=lambda _: 2 * GB)
    with pytest.raises(DownloadError) as error:
        check.check("ollama", 4_100_000_000)
    assert (error.value.code, error.value.may_resume) == ("disk_full", True)
    for words in ("4.1 GB", "2.0 GB", "/models", "1.0 GB", "disk_margin_gb", "Delete a model"):
        assert words in error.value.message


@pytest.mark.parametrize(("left", "folder"), [(None, Path("/")), (100 * GB, None)])
def test_unknown_sizes_pass(left: int | None, folder: Path | None) -> None:
    """An unknown size, and files that are stored on another machine, pass the check."""
    assert fits(left, 0, GB, folder)


def test_an_unknown_source_passes() -> None:
    DiskCheck({}, margin_bytes=GB, free_bytes=lambda _: pytest.fail("nothing to look at")).check("ollama", 100 * GB)


def test_a_missing_folder_is_measured_at_its_parent(tmp_path: Path) -> None:
    """Free space is measured at the nearest existing parent folder."""
    asked: list[Path] = []

    def free_bytes(folder: Path) -> int:
        asked.append(folder)
        return shutil.disk_usage(folder).free

    DiskCheck({"ollama": lambda: tmp_path / "not" / "yet"}, margin_bytes=0, free_bytes=free_bytes).check("ollama", 1)
    assert asked == [tmp_path]


def test_a_disk_that_can_not_be_measured_passes() -> None:
    """The transfer itself will fail if the disk is full."""

    def refuse(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    DiskCheck({"ollama": lambda: Path("/")}, margin_bytes=GB, free_bytes=refuse).check("ollama", 100 * GB)
