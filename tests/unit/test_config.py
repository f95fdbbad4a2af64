"""Settings: file, environment, and what is said when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config import ConfigError, load_settings


def write(folder: Path, text: str) -> dict[str, str]:
    path = folder / "switchyard.toml"
    path.write_text(text)
    return {"SWITCHYARD_CONFIG": str(path)}


def test_the_environment_wins_over_the_file(tmp_path):
    """Both are read; a variable overrides a key."""
    environ = write(tmp_path, 'port = 9000\nstrategy = "oldest_first"\n') | {"SWITCHYARD_PORT": "9001"}
    settings = load_settings(environ)
    assert (settings.port, settings.strategy) == (9001, "oldest_first")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot = 1", ("prot", "switchyard.toml", "no such setting", "port")),
        ('strategy = "random"', ("strategy", "switchyard.toml", "largest_first")),
        ("port = 99999", ("port", "switchyard.toml", "65535", "99999")),
        ('host = "0.0.0.0"', ("host", "loopback")),
        ('[[models]]\nid = "../x"\nsource = "x"', ("models.0.id", "switchyard.toml")),
        ('[[models]]\nid = "a"\nsource = "x"\nsise_gb = 1', ("sise_gb", "size_gb")),
        ('[[models]]\nid = "a"\nsource = "x"\n[[models]]\nid = "a"\nsource = "y"', ("more than once",)),
        ("port = ", ("not valid TOML",)),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_file_and_what_is_allowed(tmp_path, text, expected):
    """Whoever wrote it knows from the message alone what to change and where."""
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text))
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SWITCHYARD_PROT", "1", "SWITCHYARD_PROT"),
        ("SWITCHYARD_PORT", "x", "SWITCHYARD_PORT"),
        ("SWITCHYARD_MEMORY_BUDGET_GB", "-1", "SWITCHYARD_MEMORY_BUDGET_GB"),
        ("SWITCHYARD_CONFIG", "/does/not/exist.toml", "does not exist"),
        ("SWITCHYARD_MODELS", "a", "settings file"),
    ],
)
def test_a_wrong_variable_is_named(name, value, expected):
    """A typing error in the environment stops the start as one in the file does."""
    with pytest.raises(ConfigError, match=expected):
        load_settings({name: value})
