"""Settings: file, environment, and the messages for invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config import ConfigError, load_settings


def write(folder: Path, text: str) -> dict[str, str]:
    path = folder / "switchyard.toml"
    path.write_text(text)
    return {"SWITCHYARD_CONFIG": str(path)}


def test_the_environment_wins_over_the_file(tmp_path):
    """Both sources are read; a variable overrides the file's key."""
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
        (f'[[models]]\nid = "{201 * "ä"}"\nsource = "x"', ("models.0.id", "200 characters")),
        ('[[models]]\nid = "a"\nsource = "x"\nsise_gb = 1', ("sise_gb", "size_gb")),
        ('[[models]]\nid = "a"\nsource = "x"\n[[models]]\nid = "a"\nsource = "y"', ("more than once",)),
        ('[[models]]\nid = "a"\nsource = "x\\u0000y"', ("models.0.source",)),
        ('[[models]]\nid = "a"\nsource = "x"\nengine = "vlm"\n[models.options]\nx = 1', ("models.0.engine", "'vlm'")),
        ("port = ", ("not valid TOML",)),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_file_and_what_is_allowed(tmp_path, text, expected):
    """The message alone tells what to change and where."""
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
    """A typo in the environment stops the start like one in the file."""
    with pytest.raises(ConfigError, match=expected):
        load_settings({name: value})


@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [
        ("vllm", 'shm_gb = "x"', ("shm_gb", "valid number", "'x'")),
        ("vllm", "shm_gb = 0", ("shm_gb", "greater than 0")),
        ("vllm", "shm = 1", ("no option 'shm' for vllm models", "shm_gb", "sleep")),
        ("vllm", 'mounts = [["/data"]]', ("mounts 0", "2 items")),
        ("vllm", 'mounts = [["data", "/models"]]', ("mounts 0", "'data'")),
        ("vllm", 'environment = { "A=B" = "c" }', ("environment", "A=B")),
        ("vllm", 'image = "--privileged"', ("image", "--privileged")),
        ("vllm", 'revision = "../x"', ("revision", "../x")),
        ("vllm", 'sleep = "perhaps"', ("sleep", "perhaps")),
        ("llamacpp", 'context_length = "many"', ("context_length", "valid integer", "'many'")),
        ("llamacpp", "parallel = 0", ("parallel", "greater than or equal to 1")),
        ("llamacpp", "threads = -1\nparallel = 0", ("threads", "parallel")),
        ("llamacpp", 'arguments = "--verbose"', ("arguments", "valid list")),
        ("llamacpp", 'arguments = ["a\\u0000b"]', ("arguments 0",)),
        ("llamacpp", "shm_gb = 1", ("no option 'shm_gb' for llamacpp models", "context_length")),
        ("ollama", "context_length = 1.5", ("context_length", "valid integer")),
        ("ollama", "parallel = 2", ("no option 'parallel' for ollama models", "context_length")),
    ],
)
def test_a_wrong_option_of_a_model_stops_the_start(tmp_path, engine, options, expected):
    """Invalid options failed at the model's first load, or were ignored."""
    text = f'[[models]]\nid = "a"\nsource = "x"\nengine = "{engine}"\n[models.options]\n{options}\n'
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text))
    for words in ("models.0.options", "switchyard.toml", *expected):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [
        ("llamacpp", 'arguments = ["--seed", 7]\nparallel = 2', {"arguments": ["--seed", 7], "parallel": 2}),
        ("llamacpp", 'context_length = "8192"', {"context_length": 8192}),
        ("ollama", 'device = "GPU-1"', {"device": "GPU-1"}),
        (
            "vllm",
            'environment = { A = "b", C = 1 }\nmounts = [["/data", "/models"]]\nshm_gb = 0.5\nsleep = false',
            {"environment": {"A": "b", "C": 1}, "mounts": [["/data", "/models"]], "shm_gb": 0.5, "sleep": False},
        ),
    ],
)
def test_options_are_kept_unchanged(tmp_path, engine, options, expected):
    """No defaults are added, because learned figures are looked up by a model's options."""
    text = f'[[models]]\nid = "a"\nsource = "x"\nengine = "{engine}"\n[models.options]\n{options}\n'
    assert load_settings(write(tmp_path, text)).models[0].options == expected
