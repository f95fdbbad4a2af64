"""What pages say about providers and the services behind them."""

from __future__ import annotations

import pytest

from blueprints.provider_looks import badge_of, key_look, service_look
from services.engines.supervisor import Preparation, ServiceStatus
from services.providers.health import ServiceHealth
from services.providers.installation import Installation
from services.providers.local_services import LocalService
from services.providers.openai_key import KeyCheck
from services.providers.ports import Choice

DOWN = ServiceHealth(False, error="Nothing answers at http://127.0.0.1:1.", refused=True)


@pytest.mark.parametrize(
    ("choice", "key_set", "expected"),
    [
        (Choice("openai", "openai", "openai"), True, ("openai", "OpenAI")),
        (Choice("openai", "openai", "openai"), False, ("openai", "OpenAI, no key")),
        (Choice("ollama", "openai", "openai"), True, ("local", "Partly local")),
        (Choice("local", "flux", "local"), True, ("local", "Local")),
    ],
)
def test_the_badge_says_in_words_what_its_colour_says(choice, key_set, expected):
    """Green where OpenAI serves everything, orange where anything is local."""
    badge = badge_of(choice, key_set=key_set)
    assert (badge.tone, badge.word) == expected
    assert "text: " in badge.title
    assert "vision: " in badge.title


def local(status, name="ollama", **fields):
    return LocalService(name, name.title(), "http://127.0.0.1:1", status, **fields)


@pytest.mark.parametrize(
    ("status", "word", "mark", "buttons"),
    [
        (ServiceStatus("stopped", True, 1, binary="/o", can_start=True), "Not running", None, (True, False)),
        (ServiceStatus("stopped", True, 1), "Not installed", None, (False, False)),
        (ServiceStatus("starting", True, 1, binary="/o", can_stop=True), "Starting", "loading", (False, True)),
        (ServiceStatus("failed", True, 1, error="Out of memory."), "Failed", "failed", (False, False)),
        (ServiceStatus("unreachable", False, 1, error="Down."), "Not reachable", "failed", (False, False)),
    ],
)
def test_a_service_is_shown_by_mark_and_word(status, word, mark, buttons):
    look = service_look(local(status), DOWN)
    assert (look.word, look.mark, (look.can_start, look.can_stop)) == (word, mark, buttons)
    assert look.error == status.error
    assert look.figures == ()
    assert ("another machine" in (look.note or "")) is not status.local


def test_a_running_service_shows_what_it_serves_and_how_fast():
    """Coarsely: pages are sent every change of it."""
    status = ServiceStatus("running", True, 1, ours=True, can_stop=True)
    shown = {service_look(local(status), ServiceHealth(True, ms, ("a", "b"))).figures for ms in range(1, 10)}
    assert shown == {("2 models", "answers in under 10 ms")}
    flux = service_look(local(status, "flux"), ServiceHealth(True, 1400, ("flux-schnell",)))
    assert flux.figures == ("flux-schnell", "answers in over 1 s")


def test_a_server_with_less_to_say_runs_too():
    """It answers `/health`, without the model that ours name."""
    status = ServiceStatus("unreachable", True, 1, binary="/f", error="What answers there is not Flux.")
    look = service_look(local(status, "flux"), ServiceHealth(True, 3))
    assert (look.word, look.mark, look.error) == ("Running", "running", None)
    assert "Another program" in look.note
    assert service_look(local(status, "flux"), None).error == status.error


def test_a_start_shows_its_progress():
    status = ServiceStatus("starting", True, 1, preparation=Preparation("downloading", 3_100_000_000, 33_700_000_000))
    look = service_look(local(status, "flux"), DOWN)
    assert (look.figures, look.percent, look.starting) == (("Downloading 3.1 of 33.7 GB",), 9, True)


def test_missing_packages_are_named_and_can_be_installed():
    """While they are being installed: the progress instead."""
    status = ServiceStatus("stopped", True, 1)
    look = service_look(local(status, "flux", missing=("torch==2.13.0", "diffusers[x]>=1")), DOWN)
    assert (look.word, look.can_install, look.can_start) == ("Not installed", True, False)
    assert "torch and diffusers" in look.note
    job = Installation("running", "Downloading torch", percent=30)
    look = service_look(local(status, "flux", missing=("torch",), installation=job), DOWN)
    assert (look.word, look.mark, look.figures, look.percent) == ("Installing", "loading", ("Downloading torch",), 30)
    failed = Installation("failed", "It failed.", error="No space left.", log_tail="ERROR: No space left")
    look = service_look(local(status, "flux", missing=("torch",), installation=failed), DOWN)
    assert (look.error, look.log_tail, look.can_install) == ("No space left.", "ERROR: No space left", True)


def test_the_key_is_shown_by_what_openai_said_of_it():
    """Not as accepted before anybody asked."""
    words = [
        key_look("http://x", is_set=is_set, check=check).word
        for is_set, check in (
            (False, None),
            (True, None),
            (True, KeyCheck("accepted", 1.0)),
            (True, KeyCheck("refused", 1.0, "No.")),
            (True, KeyCheck("unclear", 1.0, "It hangs.")),
        )
    ]
    assert words == ["No key", "Key set", "Key accepted", "Key refused", "Key set"]
