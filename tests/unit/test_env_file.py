"""Setting one variable in a .env file without changing anything else in it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.env_file import ComposeChoice, EnvFile, EnvFileError, quoted, raw_value, with_raw, without_line
from services.switching.jobs import Job, Request, SwitchError
from tests.support.console import wait_until

KEY = "MODEL_ID"
others = st.lists(
    st.sampled_from(
        [
            b"# models\n",
            b"HF_TOKEN='a b'\r\n",
            b"\n",
            b"#MODEL_ID=old\n",
            b"MY_MODEL_ID=x\n",
            b"MODEL_ID_2=y\n",
            b"X=\xff\xfe\n",
            b"  Y = 1\n",
        ]
    )
).map(b"".join)
mine = st.sampled_from([b"", b"MODEL_ID=old\n", b"export MODEL_ID = 'old one'\r\n", b"MODEL_ID=\n"])
values = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,40}", fullmatch=True) | st.sampled_from(["a b", "$x", "#"])


@given(others, mine, others, values)
def test_a_value_is_set_and_every_other_byte_stays(before, line, after, value):
    """Wherever the line is, or if there is none; setting it twice is the same as once."""
    content = before + line + after
    written = with_raw(content, KEY, quoted(value))
    assert raw_value(written, KEY) == quoted(value)
    assert with_raw(written, KEY, quoted(value)) == written
    assert written.startswith(before)
    if line:
        assert written.endswith(after)
    else:
        assert written.startswith(content)
        assert without_line(written, KEY) in (content, content + b"\n", content + b"\r\n")


@given(others, others)
def test_removing_a_line_leaves_the_others(before, after):
    """Removing a missing line changes nothing."""
    assert without_line(before + b"MODEL_ID=x\n" + after, KEY) == before + after
    assert without_line(before + after, KEY) == before + after


def test_of_two_lines_the_last_counts():
    """As compose reads it."""
    assert raw_value(b"MODEL_ID=a\nMODEL_ID=b\n", KEY) == b"b"
    assert with_raw(b"MODEL_ID=a\nMODEL_ID=b\n", KEY, b"c") == b"MODEL_ID=a\nMODEL_ID=c\n"


@pytest.mark.parametrize("value", [b"old  # ours", b'"it\'s" # ours', b"'a # b'", b""])
def test_the_old_value_is_restored_byte_by_byte(value):
    """With its quotes; a trailing comment stays in the file all the time."""
    content = b"A=1\nMODEL_ID=" + value + b"\nB=2\n"
    written = with_raw(content, KEY, b"new")
    assert written.count(b"# ours") == content.count(b"# ours")
    before = raw_value(content, KEY)
    assert before is not None
    assert with_raw(written, KEY, before) == content


@pytest.mark.parametrize("value", ["a'b", "a\nOTHER=1", "a\x00"])
def test_a_value_that_would_break_out_of_its_line_is_refused(value):
    """A value can't add a second variable."""
    with pytest.raises(EnvFileError):
        quoted(value)


def test_mode_and_link_are_kept_and_no_temporary_file_is_left(tmp_path: Path):
    """A link stays a link; the file it leads to is replaced atomically."""
    real = tmp_path / "real.env"
    real.write_text("A=1")
    real.chmod(0o640)
    link = tmp_path / ".env"
    link.symlink_to(real)
    EnvFile(link, KEY).write("org/model")
    assert link.is_symlink()
    assert real.read_text() == "A=1\nMODEL_ID=org/model\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "real.env"]


def test_a_new_file_is_readable_by_its_owner_only(tmp_path: Path):
    """The file may hold secrets later."""
    path = tmp_path / ".env"
    EnvFile(path, KEY).write("m")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_unwritable_file_is_an_error_and_nothing_starts(tmp_path: Path):
    """Neither the file is written nor the switch started."""
    choice = ComposeChoice(EnvFile(tmp_path / "no" / "folder" / ".env", KEY))
    begun: list[str] = []

    def switch() -> Job:
        begun.append("switch")
        return Job(Request("switch", "m", "test"))

    with pytest.raises(EnvFileError, match="can't be written"):
        choice.choose("m", switch)
    assert begun == []


@pytest.mark.parametrize(("error", "expected"), [(None, "new"), (SwitchError("load_failed", "No."), "old")])
def test_a_failed_switch_restores_the_old_value(tmp_path: Path, error, expected):
    """The old value is restored only if the switch fails."""
    file = EnvFile(tmp_path / ".env", KEY)
    file.write("old")
    job = Job(Request("switch", "new", "test"))
    assert ComposeChoice(file).choose("new", lambda: job) is job
    assert file.raw() == b"new"
    job.finish("failed" if error else "success", error)
    wait_until(lambda: file.raw() == expected.encode(), "the file to be restored")


@pytest.mark.parametrize(("outcome", "expected"), [("success", "b"), ("failed", "old")])
def test_a_later_choice_is_kept_and_restores_no_superseded_one(tmp_path: Path, outcome, expected):
    """If a second switch cancels the first, the value from before both is what may be restored."""
    file = EnvFile(tmp_path / ".env", KEY)
    file.write("old")
    first, second = Job(Request("switch", "a", "test")), Job(Request("switch", "b", "test"))
    choice = ComposeChoice(file)
    choice.choose("a", lambda: first)
    choice.choose("b", lambda: second)
    first.finish("cancelled")
    second.finish(outcome)
    wait_until(lambda: file.raw() == expected.encode(), "the file to be updated")
