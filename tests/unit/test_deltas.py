"""Separating thoughts from the answer, however the text is split into deltas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.answers import Delta
from services.gateway.deltas import split_thoughts


def read(*pieces: str | Delta) -> tuple[str, str]:
    """The stripped thoughts and the answer, at the end of the stream."""
    thought = said = ""
    for piece in split_thoughts(p if isinstance(p, Delta) else Delta(p) for p in pieces):
        if piece.all_before:
            thought, said = thought + said, ""
        elif piece.thought:
            thought += piece.text
        else:
            said += piece.text
    return thought.strip(), said


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("Hello", "", "Hello"),
        ("<think>Hm.\n</think>\n\nHello", "Hm.", "Hello"),
        ("\n<think>\nHm.</think>Hello", "Hm.", "Hello"),
        ("<think>\n\n</think>\n\nHello", "", "Hello"),
        ("<think>Hm", "Hm", ""),
        ("<think>Hm </th", "Hm </th", ""),
        ("<think>a < b and </b></think>c", "a < b and </b>", "c"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("<thinker>", "", "<thinker>"),
        ("<thi", "", "<thi"),
        (" ", "", " "),
        ("The tag <think>x</think> is XML", "", "The tag <think>x</think> is XML"),
        ("Hm, let me see.\n</think>\n\nHello", "Hm, let me see.", "Hello"),
        ("Hm.\n\n</think>", "Hm.", ""),
        ("</think>\n\nHello", "", "Hello"),
        ("Write `</think>` at the end", "", "Write `</think>` at the end"),
        ("So:\n```xml\n</think>\n```\nDone", "", "So:\n```xml\n</think>\n```\nDone"),
        ("So:\n</think> ends it\nDone", "", "So:\n</think> ends it\nDone"),
        ("Hm\n </think>\t\nHello\n</think>\n", "Hm", "Hello\n</think>\n"),
    ],
)
def test_tags_are_read_whole_and_in_pieces(text: str, thought: str, said: str) -> None:
    """Tags are recognised where models write them and nowhere else; sent at once or character by character."""
    assert read(text) == (thought, said)
    assert read(*text) == (thought, said)


def test_with_a_thought_field_tags_are_plain_text() -> None:
    """A model with a field for thoughts may write about the tags in its answer; leading line breaks are dropped."""
    assert read(Delta("\n Hm", thought=True), "\n\nThe tag:\n</think>\n") == ("Hm", "The tag:\n</think>\n")


WORDS = st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "\n", " ", "```", "word", "\n</think>\n"])


@given(st.lists(WORDS, max_size=12).map("".join), st.data())
def test_the_split_into_deltas_changes_nothing(text: str, data: st.DataObject) -> None:
    """Engines may send a tag as one delta or as five."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]
    assert read(*pieces) == read(text)


@given(st.text(st.sampled_from("ab<>/ \n`"), max_size=40))
def test_text_without_tags_is_unchanged(text: str) -> None:
    """No text is held back for good."""
    assert read(*text) == ("", text)
