"""One line of a .env file, and nothing else of it."""

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
    """Wherever the line stands, and where there is none; twice is the same as once."""
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
def test_a_line_taken_out_leaves_the_others(before, after):
    """And nothing happens where there is none."""
    assert without_line(before + b"MODEL_ID=x\n" + after, KEY) == before + after
    assert without_line(before + after, KEY) == before + after


def test_of_two_lines_the_last_counts():
    """As compose reads it."""
    assert raw_value(b"MODEL_ID=a\nMODEL_ID=b\n", KEY) == b"b"
    assert with_raw(b"MODEL_ID=a\nMODEL_ID=b\n", KEY, b"c") == b"MODEL_ID=a\nMODEL_ID=c\n"


@pytest.mark.parametrize("value", [b"old  # ours", b'"it\'s" # ours', b"'a # b'", b""])
def test_what_stood_there_comes_back_to_the_byte(value):
    """Its quotes and the comment behind it, which stays there all the while."""
    content = b"A=1\nMODEL_ID=" + value + b"\nB=2\n"
    written = with_raw(content, KEY, b"new")
    assert written.count(b"# ours") == content.count(b"# ours")
    before = raw_value(content, KEY)
    assert before is not None
    assert with_raw(written, KEY, before) == content


@pytest.mark.parametrize("value", ["a'b", "a\nOTHER=1", "a\x00"])
def test_a_value_that_would_break_out_of_its_line_is_refused(value):
    """No second variable gets in this way."""
    with pytest.raises(EnvFileError):
        quoted(value)


def test_the_file_keeps_its_mode_and_its_link_and_leaves_no_draft(tmp_path: Path):
    """A link stays one; what it leads to is replaced whole."""
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


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path):
    """Others' tokens come to stand in it."""
    path = tmp_path / ".env"
    EnvFile(path, KEY).write("m")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_can_not_be_written_says_so_and_nothing_begins(tmp_path: Path):
    """Neither the file nor the switch."""
    choice = ComposeChoice(EnvFile(tmp_path / "no" / "folder" / ".env", KEY))
    begun: list[str] = []

    def switch() -> Job:
        begun.append("switch")
        return Job(Request("switch", "m", "test"))

    with pytest.raises(EnvFileError, match="can't be written"):
        choice.choose("m", switch)
    assert begun == []


@pytest.mark.parametrize(("error", "expected"), [(None, "new"), (SwitchError("load_failed", "No."), "old")])
def test_what_stood_there_stands_there_again_when_the_switch_fails(tmp_path: Path, error, expected):
    """Only then."""
    file = EnvFile(tmp_path / ".env", KEY)
    file.write("old")
    job = Job(Request("switch", "new", "test"))
    assert ComposeChoice(file).choose("new", lambda: job) is job
    assert file.raw() == b"new"
    job.finish("failed" if error else "success", error)
    wait_until(lambda: file.raw() == expected.encode(), "the file to follow")


@pytest.mark.parametrize(("outcome", "expected"), [("success", "b"), ("failed", "old")])
def test_a_later_choice_is_not_taken_back_and_does_not_bring_back_an_earlier_one(tmp_path: Path, outcome, expected):
    """The first switch is cancelled for a second one; what stood there before both is what may come back."""
    file = EnvFile(tmp_path / ".env", KEY)
    file.write("old")
    first, second = Job(Request("switch", "a", "test")), Job(Request("switch", "b", "test"))
    choice = ComposeChoice(file)
    choice.choose("a", lambda: first)
    choice.choose("b", lambda: second)
    first.finish("cancelled")
    second.finish(outcome)
    wait_until(lambda: file.raw() == expected.encode(), "the file to follow")
