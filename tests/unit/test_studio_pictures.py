"""The Studio's pictures: only whole images, private files by content, a cap on the total, oldest first out."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from services.providers.adapters.pictures import MAX_PICTURE_BYTES
from services.providers.ports import Picture
from services.studio.pictures import NotAPicture, Pictures, PicturesUnwritable, media_type
from tests.support.faults import full_disk, small_disk
from tests.support.studio_providers import png

JPEG = b"\xff\xd8\xff\xe0" + b"x" * 20 + b"\xff\xd9"
WEBP = b"RIFF" + (16).to_bytes(4, "little") + b"WEBPVP8 " + b"x" * 8


def picture(seed: int = 0) -> Picture:
    return Picture(png(seed), "image/png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


@pytest.fixture
def pictures(folder: Path) -> Pictures:
    return Pictures(folder, 1_000_000)


@pytest.mark.parametrize(("data", "kind"), [(png(1), "image/png"), (JPEG, "image/jpeg"), (WEBP, "image/webp")])
def test_a_picture_is_recognized_by_its_content(pictures, data, kind):
    """What the provider says about the type doesn't count."""
    kept = pictures.keep(Picture(data, "text/html"))
    assert pictures.read(kept) == Picture(data, kind)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"<svg/>", png(1)[:-8], png(1)[:20], JPEG[:-2], WEBP[:-1], b"GIF89a", b"\x89PNG"]
)
def test_what_is_no_whole_picture_is_refused(pictures, folder, data):
    assert media_type(data) is None
    with pytest.raises(NotAPicture):
        pictures.keep(Picture(data, "image/png"))
    assert not folder.exists()


def test_a_picture_beyond_the_limits_is_refused(folder):
    huge = Picture(png(1)[:-16] + b"\0" * MAX_PICTURE_BYTES + png(1)[-16:], "image/png")
    with pytest.raises(NotAPicture, match="limit"):
        Pictures(folder, 2 * MAX_PICTURE_BYTES).keep(huge)
    with pytest.raises(NotAPicture, match="studio_pictures_gb"):
        Pictures(folder, 10).keep(picture())


def test_files_are_private_and_named_by_their_content(pictures, folder):
    kept = pictures.keep(picture())
    assert kept == hashlib.sha256(png(0)).hexdigest()
    assert pictures.keep(picture()) == kept
    [file] = folder.iterdir()
    assert file.name == kept
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_oldest_pictures_go_first(folder):
    size = len(png(0))
    pictures = Pictures(folder, 3 * size + 2)
    kept = [pictures.keep(picture(seed)) for seed in range(3)]
    pictures.keep(picture(0))  # made again: the newest now
    new = pictures.keep(picture(9))
    assert [pictures.has(each) for each in (*kept, new)] == [True, False, True, True]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3 * size + 2
    assert pictures.read(kept[1]) is None


def test_a_later_run_finds_the_pictures_and_removes_unfinished_ones(folder):
    first = Pictures(folder, 1_000_000)
    kept = [first.keep(picture(seed)) for seed in range(2)]
    os.utime(folder / kept[0], (2e9, 2e9))  # the newest
    (folder / f"{'0' * 64}.part").write_bytes(b"cut")
    (folder / "notes.txt").write_text("somebody's")
    later = Pictures(folder, 2 * len(png(0)) + 2)
    assert all(map(later.has, kept))
    assert {file.name for file in folder.iterdir()} == {*kept, "notes.txt"}
    later.keep(picture(5))
    assert [later.has(each) for each in kept] == [True, False]


def test_unknown_names_and_paths_lead_nowhere(pictures, folder):
    pictures.keep(picture())
    (folder / "secret").write_bytes(png(3))
    for name in ("0" * 64, "secret", "../switchyard.db", "", "0" * 63):
        assert pictures.read(name) is None
        assert not pictures.has(name)


def test_a_removed_picture_is_gone(pictures, folder):
    kept = pictures.keep(picture())
    pictures.remove(kept)
    pictures.remove(kept)
    assert not pictures.has(kept)
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path):
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        pictures = Pictures(disk / "pictures", 1_000_000)
        kept = pictures.keep(picture())
        with full_disk(disk), pytest.raises(PicturesUnwritable, match="No space"):
            pictures.keep(Picture(png(1, side=64)[:-12] + b"\0" * 100_000 + png(1)[-12:], "image/png"))
        assert [file.name for file in (disk / "pictures").iterdir()] == [kept]
        assert pictures.has(kept)
