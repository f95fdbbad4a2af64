"""Downloads connect only to configured hosts: a model's name reaches no service of this machine or its network."""

from __future__ import annotations

import re
import socket
from contextlib import closing

import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from services.config import ConfigError, load_settings
from services.downloads.fetcher import DownloadError
from services.downloads.hosts import host_key, is_public
from services.downloads.ollama.pull import OllamaFetcher
from services.downloads.ollama.registry import Registries
from services.engines.ollama.names import OllamaName

HOSTS = ("hf.co", "registry.lan:5000")
FETCHER = OllamaFetcher(
    "http://127.0.0.1:9", find_binary=lambda: None, registries=Registries("https://registry.ollama.ai", HOSTS)
)
MIRROR = OllamaFetcher("http://127.0.0.1:9", find_binary=lambda: None, registries=Registries("https://mirror.lan"))
SETTINGS = {"SWITCHYARD_CONFIG": "/dev/null"}


@pytest.mark.parametrize(
    "name",
    [
        "localhost:1234/x",
        "localhost/library/x",
        "127.0.0.1/library/x",
        "127.0.0.1:8787/v1/x:latest",
        "[::1]:1234/x",
        "[::ffff:127.0.0.1]/a/x",
        "2130706433:80/x",
        "0x7f000001:80/a/x",
        "127.1/a/x",
        "0.0.0.0:11434/a/x",
        "10.0.0.1/a/x",
        "169.254.169.254/latest/x",
        "printer.lan/a/x",
        "registry.lan/a/x",
        "registry.lan:5001/a/x",
        "hf.co:8443/a/x",
        "hf.co.evil.example/a/x",
        "evil.example/hf.co/x",
        "user@localhost:1234/x",
        "http://localhost:1234/x",
    ],
)
def test_a_name_that_points_elsewhere_is_refused(name: str) -> None:
    """Ollama, which would connect to any host, is not called."""
    with pytest.raises(DownloadError) as caught:
        FETCHER.check_name(name)
    assert caught.value.code in ("registry_not_allowed", "invalid_name")


@pytest.mark.parametrize(
    "name",
    [
        "llama3.2",
        "user/model:7b",
        "registry.ollama.ai/library/x",
        "hf.co/a/x:Q4_K_M",
        "HF.co:443/a/x",
        "registry.lan:5000/a/x",
    ],
)
def test_a_name_of_a_configured_registry_passes(name: str) -> None:
    """Ollama's own registry is always allowed."""
    assert FETCHER.check_name(name)


def test_the_error_says_what_is_allowed_and_what_to_do() -> None:
    """The message names the host, the allowed registries and the setting."""
    with pytest.raises(DownloadError) as caught:
        FETCHER.check_name("localhost:1234/x")
    assert caught.value.message == (
        "localhost:1234 is not one of the registries that models may come from: registry.ollama.ai, hf.co, "
        "registry.lan:5000. If you trust it, add it to the setting download_hosts."
    )


@given(st.from_regex(r"([A-Za-z0-9.:\[\]@-]{1,20}/){0,3}[a-z0-9.:]{1,8}", fullmatch=True))
def test_accepted_names_lead_to_configured_registries(name: str) -> None:
    """Any accepted name leads Ollama to one of the allowed hosts."""
    try:
        checked = FETCHER.check_name(name)
    except DownloadError:
        return
    assert host_key(OllamaName.parse(checked).host) in ("registry.ollama.ai", *HOSTS)


def test_local_services_are_not_contacted(client: FlaskClient) -> None:
    """Over HTTP: 422 in the contract's shape, and no connection is made."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.setblocking(False)
        name = f"localhost:{server.getsockname()[1]}/library/x"
        answer = client.post("/api/providers/models/download", json={"model": name})
        assert (answer.status_code, answer.get_json()["error"]) == (422, "registry_not_allowed")
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700::1111", True),
        ("[2606:4700::1111]", True),
        ("localhost", False),
        ("127.0.0.1", False),
        ("127.1", False),
        ("2130706433", False),
        ("0x7f000001", False),
        ("017700000001", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%lo", False),
        ("fd00::1", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
    ],
)
def test_public_addresses_are_recognised(host: str, public: bool) -> None:
    """In every notation of an address."""
    assert is_public(host) is public


def test_the_setting_lists_hosts() -> None:
    """As a list in the file, comma-separated in the environment; an invalid host stops the start."""
    assert load_settings(SETTINGS).download_hosts == ("hf.co", "huggingface.co")
    told = load_settings({**SETTINGS, "SWITCHYARD_DOWNLOAD_HOSTS": "registry.lan:5000, hf.co"})
    assert told.download_hosts == ("registry.lan:5000", "hf.co")
    with pytest.raises(ConfigError, match=re.escape("'https://hf.co' is not a host, such as hf.co")):
        load_settings(SETTINGS, download_hosts=("https://hf.co",))


@pytest.mark.parametrize("name", ["capybarahermes-2.5-mistral-7b", "capybarahermes-2.5-mistral-7b:latest"])
def test_what_ollamas_library_lacks_is_downloaded_from_where_it_is(name):
    """Another registry may have it under that name."""
    assert FETCHER.check_name(name) == "hf.co/TheBloke/CapybaraHermes-2.5-Mistral-7B-GGUF:Q4_0"
    assert MIRROR.check_name(name) == "capybarahermes-2.5-mistral-7b:latest"
    assert FETCHER.check_name(f"{name.partition(':')[0]}:q8") == "capybarahermes-2.5-mistral-7b:q8"
