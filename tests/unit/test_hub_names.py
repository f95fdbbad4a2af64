"""Names of models on the Hugging Face hub, and the files they select."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.downloads.fetcher import DownloadError
from services.downloads.huggingface.names import HubName, choose, parse

WORD = st.from_regex(r"[A-Za-z0-9_]{1,20}", fullmatch=True)
MARK = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}", fullmatch=True)


def chosen(name: str, *listed: str) -> tuple[str, ...]:
    return choose(parse(name), listed)


def refusal(name: str, *listed: str) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        chosen(name, *listed)
    return caught.value


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", HubName("a", "b")),
        ("  TheBloke/Some.Model-7B_GGUF ", HubName("TheBloke", "Some.Model-7B_GGUF")),
        ("a/b:Q4_K_M", HubName("a", "b", tag="Q4_K_M")),
        ("a/b/c.gguf", HubName("a", "b", path="c.gguf")),
        ("a/b/q4/c-1.5+x=y.gguf@main", HubName("a", "b", path="q4/c-1.5+x=y.gguf", revision="main")),
        ("a/b@refs/pr/1", HubName("a", "b", revision="refs/pr/1")),
        ("a/b:UD-Q2.K@v1.0", HubName("a", "b", tag="UD-Q2.K", revision="v1.0")),
    ],
)
def test_names_are_parsed_into_their_parts(text: str, name: HubName) -> None:
    assert parse(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a/",
        "/a/b",
        "a/b/",
        "a/b/c",
        "a/b/c.bin",
        "a/b/.gguf",
        "a/b//c.gguf",
        "a/../b/c.gguf",
        "../b/c.gguf",
        "a/b/../../c.gguf",
        "-a/b",
        "--token/b",
        "a/-b",
        "a/b.",
        "a--c/b",
        "a/b.git",
        "a/b/-c.gguf",
        "a/b:",
        "a/b:-Q4",
        "a/b@",
        "a/b@-x",
        "a/b@a..b",
        "a b/c",
        "a/b\nc",
        "a/b\x00",
        "a\\b/c",
        "https://huggingface.co/a/b",
        "a/b/" + "c" * 300 + ".gguf",
        "a/" + "b" * 97,
    ],
)
def test_invalid_names_are_refused_with_the_valid_forms(text: str) -> None:
    with pytest.raises(DownloadError, match="owner/repo:Q4_K_M") as caught:
        parse(text)
    assert caught.value.code == "invalid_name"


@given(WORD, WORD, st.none() | MARK, st.none() | MARK)
@settings(deadline=None)
def test_a_formatted_name_parses_to_the_same(owner: str, repo: str, tag: str | None, revision: str | None) -> None:
    name = HubName(owner, repo, tag=tag, revision=revision)
    assert parse(str(name)) == name


@given(st.text(max_size=60) | st.text("ab./:@-_", max_size=12))
@settings(deadline=None)
def test_any_text_is_parsed_or_refused_and_never_leaves_its_folder(text: str) -> None:
    with suppress(DownloadError):
        name = str(parse(text))
        assert ".." not in name
        assert not name.startswith(("-", "/", "."))


def test_the_only_model_is_taken_whatever_else_is_listed() -> None:
    assert chosen("a/b", "README.md", "m.Q8_0.gguf", "mmproj-F16.gguf", "config.json") == ("m.Q8_0.gguf",)


def test_the_only_split_model_is_taken_with_all_its_parts_in_order() -> None:
    parts = ("q/m-00001-of-00003.gguf", "q/m-00002-of-00003.gguf", "q/m-00003-of-00003.gguf")
    assert chosen("a/b", *reversed(parts)) == parts


def test_of_several_models_the_default_one_is_taken() -> None:
    assert chosen("a/b", "m-Q2_K.gguf", "m-q4_k_m.gguf", "m-Q8_0.gguf") == ("m-q4_k_m.gguf",)


def test_without_a_default_the_choices_are_listed_as_names() -> None:
    error = refusal("a/b", "m-Q2_K.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "mmproj.gguf")
    assert error.code == "choose_file"
    assert "a/b/m-Q2_K.gguf, a/b/m-Q8_0-00001-of-00002.gguf." in error.message
    assert "mmproj" not in error.message


def test_long_lists_of_choices_are_truncated() -> None:
    assert "and 10 more" in refusal("a/b", *(f"m{number:02}.gguf" for number in range(40))).message


def test_a_tag_selects_by_name_ignoring_case() -> None:
    assert chosen("a/b:q8_0", "m-Q2_K.gguf", "m-Q8_0.gguf") == ("m-Q8_0.gguf",)


def test_an_ambiguous_tag_selects_the_file_that_has_it_as_a_word() -> None:
    assert chosen("a/b:F16", "m-BF16.gguf", "m-F16.gguf") == ("m-F16.gguf",)
    assert chosen("a/b:Q4_K", "m-Q4_K.gguf", "m-Q4_K_S.gguf") == ("m-Q4_K.gguf",)


def test_a_tag_can_be_the_folder_of_a_split_model() -> None:
    parts = ("Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf")
    assert chosen("a/b:Q8_0", "Q2_K/m.gguf", *parts) == parts


def test_an_ambiguous_or_unknown_tag_lists_the_choices() -> None:
    several = refusal("a/b:Q4", "m-Q4_K_S.gguf", "m-Q4_0.gguf", "m-Q8_0.gguf")
    assert (several.code, "Q8_0" in several.message) == ("choose_file", False)
    nothing = refusal("a/b:Q3_K", "m-Q4_0.gguf", "m-Q8_0.gguf")
    assert nothing.code == "choose_file"
    assert "no file for Q3_K" in nothing.message
    assert "m-Q4_0.gguf" in nothing.message


def test_a_path_selects_that_file_or_all_parts_of_its_set() -> None:
    listed = ("m-Q4_K_M.gguf", "x/m-00001-of-00002.gguf", "x/m-00002-of-00002.gguf", "mmproj-F16.gguf")
    assert chosen("a/b/m-Q4_K_M.gguf", *listed) == ("m-Q4_K_M.gguf",)
    assert chosen("a/b/x/m-00002-of-00002.gguf", *listed) == listed[1:3]
    assert chosen("a/b/mmproj-F16.gguf", *listed) == ("mmproj-F16.gguf",)


def test_a_missing_path_is_unknown() -> None:
    error = refusal("a/b/none.gguf", "m.gguf")
    assert error.code == "unknown_model"
    assert "a/b/m.gguf" in error.message


def test_a_repository_without_gguf_says_so() -> None:
    assert refusal("a/b", "model.safetensors", "mmproj-F16.gguf").code == "no_gguf"


def test_a_set_with_parts_missing_is_refused() -> None:
    error = refusal("a/b", "m-00001-of-00003.gguf", "m-00003-of-00003.gguf")
    assert error.code == "incomplete_set"
    assert "2 of the 3 parts" in error.message


@pytest.mark.parametrize(
    "path", ["../../x.gguf", "/x.gguf", "a/../../x.gguf", "a//x.gguf", "./x.gguf", "a\\x.gguf", "a\nb.gguf"]
)
def test_a_listing_with_a_path_outside_its_folder_is_refused(path: str) -> None:
    assert refusal("a/b/m.gguf", "m.gguf", path).code == "unsafe_path"


def test_what_a_name_covers() -> None:
    assert parse("a/b").covers("x/any.gguf")
    assert parse("a/b:q4_0").covers("m-Q4_0.gguf")
    assert not parse("a/b:q4_0").covers("m-Q8_0.gguf")
    assert parse("a/b/m-00002-of-00002.gguf").covers("m-00001-of-00002.gguf")
    assert not parse("a/b/m.gguf").covers("n.gguf")
