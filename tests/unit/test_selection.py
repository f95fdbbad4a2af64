"""The choice of providers: all or nothing, by people only, kept if the settings say so."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.providers.ports import ALIASES, PROVIDERS, Choice
from services.providers.selection import Problem, ProviderUnavailable, Selection, UnknownProvider, as_document

DEFAULTS = Choice("openai", "openai", "openai")
NAMES = [(c, name) for c in PROVIDERS for name in (*PROVIDERS[c], *ALIASES[c])]


class Down:
    """What is down: pairs of capability and provider."""

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self.pairs = set(pairs)

    def __call__(self, capability, provider):
        if (capability, provider) not in self.pairs:
            return None
        return Problem(capability, provider, f"{provider} service not available", "Start it.")


def meeting():
    """A check that finds no problem, and returns only while another one is under way."""
    both = threading.Barrier(2, timeout=60)

    def check(_capability, _provider):
        both.wait()

    return check


class Notes(dict):
    """Stored notes."""

    def put(self, key, value):
        self[key] = value


def test_a_switch_changes_what_it_names_and_the_defaults_stay():
    selection = Selection(DEFAULTS, Down())
    assert selection.switch({"image": "flux"}) == Choice("openai", "flux", "openai")
    assert selection.switch({"vision": "local", "llm": "vllm"}) == Choice("vllm", "flux", "local")
    assert (selection.current, selection.defaults) == (Choice("vllm", "flux", "local"), DEFAULTS)


def test_aliases_are_resolved():
    selection = Selection(Choice("local", "flux", "local"), Down())
    assert selection.switch({"image": "dalle", "vision": "gpt-vision"}) == Choice("local", "openai", "openai")


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({}, ("llm", "image", "vision")),
        ({"audio": "openai"}, ("audio", "llm", "image", "vision")),
        ({"llm": "dalle"}, ("dalle", "openai", "ollama", "vllm", "llamacpp", "local")),
        ({"image": "midjourney"}, ("midjourney", "openai", "dalle", "flux")),
        ({"vision": "Local"}, ("openai", "gpt-vision", "local")),
        ({"llm": None}, ("None", "ollama")),
        ({"llm": ["ollama"]}, ("ollama",)),
        ({"image": "flux", "llm": "x" * 1000}, ("llamacpp",)),
    ],
)
def test_what_is_unknown_is_refused_with_what_there_is(wanted, named):
    """Nothing is switched, whatever else was named."""
    selection = Selection(DEFAULTS, Down())
    with pytest.raises(UnknownProvider) as caught:
        selection.switch(wanted)
    for name in named:
        assert name in str(caught.value)
    assert len(str(caught.value)) < 400
    assert selection.current == DEFAULTS


@given(
    switches=st.lists(st.dictionaries(st.sampled_from([*PROVIDERS, "audio"]), st.sampled_from([n for _, n in NAMES]))),
    down=st.sets(st.sampled_from(NAMES)),
)
def test_a_switch_is_all_or_nothing(switches, down):
    """After any sequence of switches, each of them did everything it named, or nothing and said so."""
    selection = Selection(DEFAULTS, Down(*down))
    for wanted in switches:
        before = as_document(selection.current)
        problems = None
        resolved = {c: ALIASES.get(c, {}).get(name, name) for c, name in wanted.items()}
        known = bool(wanted) and all(name in PROVIDERS.get(c, ()) for c, name in resolved.items())
        try:
            selection.switch(wanted)
        except UnknownProvider:
            assert not known
        except ProviderUnavailable as error:
            problems = {(problem.capability, problem.provider) for problem in error.problems}
        else:
            problems = set()
        if problems is not None:
            assert known
            assert problems == down & set(resolved.items())
        assert as_document(selection.current) == (before | resolved if problems == set() else before)


def test_a_provider_that_goes_down_stays_chosen():
    """Nothing takes its place by itself, and choosing something else does not check it."""
    down = Down()
    selection = Selection(DEFAULTS, down)
    selection.switch({"llm": "ollama"})
    down.pairs.add(("llm", "ollama"))
    assert selection.current.llm == "ollama"
    assert selection.switch({"image": "flux"}) == Choice("ollama", "flux", "openai")


def test_switches_at_the_same_time_lose_nothing():
    """Their checks overlap: each waits for the other's to have begun."""
    selection = Selection(DEFAULTS, meeting())
    threads = [
        threading.Thread(target=selection.switch, args=({capability: name},))
        for capability, name in (("llm", "local"), ("image", "flux"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert selection.current == Choice("local", "flux", "openai")


def test_the_providers_of_a_switch_are_checked_side_by_side():
    """Two services that hang take as long as one: each check waits for the other."""
    selection = Selection(DEFAULTS, meeting())
    assert selection.switch({"llm": "ollama", "image": "flux"}).image == "flux"


def test_a_check_that_fails_unforeseen_switches_nothing():
    def fail(_capability, _provider):
        raise OSError("no more threads")

    selection = Selection(DEFAULTS, fail)
    with pytest.raises(OSError, match="no more threads"):
        selection.switch({"llm": "ollama", "image": "flux"})
    assert selection.current == DEFAULTS


def test_a_choice_is_gone_after_a_restart():
    """Unless it is to be remembered."""
    notes = Notes()
    Selection(DEFAULTS, Down()).switch({"llm": "ollama"})
    assert Selection(DEFAULTS, Down()).current == DEFAULTS
    Selection(DEFAULTS, Down(), notes=notes).switch({"llm": "ollama"})
    assert Selection(DEFAULTS, Down(), notes=notes).current == Choice("ollama", "openai", "openai")


def test_what_was_not_chosen_follows_the_settings_after_a_restart():
    """Only choices are stored, not the defaults of that time."""
    notes = Notes()
    Selection(DEFAULTS, Down(), notes=notes).switch({"llm": "ollama"})
    later = Selection(Choice("local", "flux", "local"), Down(), notes=notes)
    assert later.current == Choice("ollama", "flux", "local")


@pytest.mark.parametrize("stored", ["", "{", "[]", "7", '{"llm": "gone", "image": "flux", "sound": "x"}', "[" * 9999])
def test_a_stored_choice_that_this_version_does_not_know_is_left_out(stored):
    """A choice stored by another version, or damaged, does not keep the app from starting."""
    selection = Selection(DEFAULTS, Down(), notes=Notes(providers=stored))
    assert selection.current in (DEFAULTS, Choice("openai", "flux", "openai"))
    assert (selection.current.image == "flux") == ("flux" in stored)


def test_listeners_hear_of_switches_only():
    heard: list[str] = []
    selection = Selection(DEFAULTS, Down(("image", "flux")), on_change=lambda: heard.append("change"))
    with pytest.raises(ProviderUnavailable):
        selection.switch({"image": "flux"})
    assert heard == []
    selection.switch({"llm": "local"})
    assert heard == ["change"]
