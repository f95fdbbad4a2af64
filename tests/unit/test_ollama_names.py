"""Names of Ollama models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engines.ollama.names import MAX_LENGTH, OllamaName


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("llama3.2", "llama3.2:latest", "llama3.2"),
        ("llama3.2:1b", "llama3.2:1b", "llama3.2:1b"),
        ("library/llama3.2", "llama3.2:latest", "llama3.2"),
        ("registry.ollama.ai/library/llama3.2", "llama3.2:latest", "llama3.2"),
        ("user/x", "user/x:latest", "user/x"),
        ("hf.co/user/repo:Q4_K_M", "hf.co/user/repo:Q4_K_M", "hf.co/user/repo:Q4_K_M"),
        ("127.0.0.1:5005/library/tiny-b", "127.0.0.1:5005/library/tiny-b:latest", "127.0.0.1:5005/library/tiny-b"),
        ("127.0.0.1:5005/tiny-b:7b", "127.0.0.1:5005/library/tiny-b:7b", "127.0.0.1:5005/library/tiny-b:7b"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest", "localhost:5000/a/b"),
    ],
)
def test_a_name_is_formatted_as_ollama_lists_it(text, full, short):
    """Default parts are left out: the registry, its library, and in the short form the tag."""
    name = OllamaName.parse(text)
    assert (name.full, name.short) == (full, short)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-rf",
        "--insecure",
        "user/-x",
        "x:-latest",
        "-host.example/a/b",
        "..",
        "a/../b",
        "model..x",
        "bad name!!",
        "a/b/c/d",
        "x:",
        ":x",
        "x:y:z",
        "/x",
        "x/",
        "https://ollama.com/library/x",
        "host:99999/a/b",
        "user/x\n",
        "x\0",
        "ｌlama",
        "x?y",
        "x#y",
        "user@host/x",
    ],
)
def test_an_invalid_name_is_refused(text):
    """No option, path, line break or address is accepted."""
    with pytest.raises(ValueError, match=r"Write model or model:tag"):
        OllamaName.parse(text)


def test_a_name_that_is_too_long_is_refused_with_its_length():
    """The limit is 300 characters."""
    with pytest.raises(ValueError, match=rf"{MAX_LENGTH + 1} characters"):
        OllamaName.parse("x" * (MAX_LENGTH + 1))


@settings(deadline=None)
@given(st.text(alphabet="aZ0._-:/ @\n%é", max_size=40) | st.text(max_size=40))
def test_any_parsed_name_is_safe_and_stable(text):
    """No part begins with a dash or leads to a parent folder; parsing a formatted name gives the same name."""
    try:
        name = OllamaName.parse(text)
    except ValueError:
        return
    assert OllamaName.parse(name.full) == OllamaName.parse(name.short) == name
    assert all(part and part[0] not in "-." for part in (name.host, name.namespace, name.model, name.tag))
    assert ".." not in name.full
    assert name.full.isascii()
    assert name.full.isprintable()
    assert " " not in name.full
