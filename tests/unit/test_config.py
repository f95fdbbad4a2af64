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
        ("openai", 'key = "sk-1"', ("no option 'key' for openai models", "base_url, key_env")),
        ("openai", 'key_env = "MY KEY"', ("key_env",)),
        ("openai", 'base_url = "https://user:secret@host/v1"', ("base_url",)),
        ("openai", 'base_url = "ftp://host"', ("base_url", "ftp://host")),
        ("openai", 'base_url = "https://host:port/v1"', ("base_url", "must be an address such as https://host/v1")),
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
        ("openai", 'base_url = "https://host/v1/"', {"base_url": "https://host/v1"}),
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


SECRET = "s3cr3t-hunter2"


@pytest.mark.parametrize(
    "environ",
    [
        {"OPENAI_API_KEY": f"{SECRET} with spaces"},
        {"SWITCHYARD_OPENAI_API_KEY": f"{SECRET}\nX-Injected: yes"},
        {"SWITCHYARD_OPENAI_API_KEY": f"{SECRET}-ключ"},
        {"OLLAMA_BASE_URL": f"http://user:{SECRET}@ollama.lan:11434"},
        {"OLLAMA_BASE_URL": f"user:{SECRET}@ollama.lan:11434"},
        {"OLLAMA_BASE_URL": f"http://user:{SECRET}/with/slashes@ollama.lan"},
        {"FLUX_API_URL": f"http://{SECRET}@flux.lan:8001"},
        {"OPENAI_BASE_URL": f"https://user:{SECRET}@api.lan/v1"},
        {"OPENAI_BASE_URL": f"https://api.lan/v1?api_key={SECRET}"},
        {"SWITCHYARD_DOWNLOAD_HOSTS": f"user:{SECRET}@registry.lan"},
    ],
)
def test_a_rejected_secret_is_not_printed(environ):
    """Keys, and the user, password and query of an address, end up in logs otherwise: the error is printed there."""
    with pytest.raises(ConfigError) as caught:
        load_settings(environ)
    assert SECRET not in str(caught.value)
    (name,) = environ
    assert name.lower().removeprefix("switchyard_") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f'openai_api_key = ["{SECRET}"]',
        f'openai_api_key = {{ key = "{SECRET}" }}',
        f'openai_api_ky = "{SECRET}"',
        '[[models]]\nid = "a"\nsource = "x"\nengine = "vllm"\n[models.options.environment]\n'
        f'HF_TOKEN = "{SECRET}\\u0000"',
        f'[[models]]\nid = "a"\nsource = "x"\n[models.options]\narguments = ["--api-key={SECRET}\\u0000"]',
        f'[[models]]\nid = "a"\nsource = "x"\n[models.options]\napi_key = "{SECRET}"',
        f'[[models]]\nid = "a"\nsource = "https://user:{SECRET}@host/\\u0000"',
    ],
)
def test_a_rejected_secret_of_the_file_is_not_printed(tmp_path, text):
    """Also in tables and lists, in misspelt keys, and in what is passed on to engines."""
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text))
    assert SECRET not in str(caught.value)


def test_a_key_is_never_shown_again():
    """Neither by the settings as text nor by their values."""
    settings = load_settings({"OPENAI_API_KEY": f" {SECRET}\n"})
    assert settings.openai_api_key.get_secret_value() == SECRET
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_providers_are_set_with_the_names_of_other_programs():
    """The variables that such a stack sets anyway, their aliases, and the prefixed ones, which win."""
    environ = {
        "LLM_PROVIDER": "ollama",
        "IMAGE_PROVIDER": "dalle",
        "VISION_PROVIDER": "gpt-vision",
        "SWITCHYARD_VISION_PROVIDER": "local",
        "OPENAI_BASE_URL": "https://proxy.lan/openai/v1/",
        "FLUX_API_URL": "http://gpu.lan:8001/",
        "FLUX_MODEL": "flux-dev",
        "LOCAL_VISION_API_URL": "http://127.0.0.1:9002",
    }
    settings = load_settings(environ)
    assert (settings.llm_provider, settings.image_provider, settings.vision_provider) == ("ollama", "openai", "local")
    assert (settings.openai_base_url, settings.flux_api_url) == ("https://proxy.lan/openai/v1", "http://gpu.lan:8001")
    assert (settings.flux_model, settings.local_vision_api_url) == ("flux-dev", "http://127.0.0.1:9002")


@pytest.mark.parametrize("name", ["LLM_PROVIDER", "IMAGE_PROVIDER", "VISION_PROVIDER"])
def test_an_unknown_provider_stops_the_start(name):
    """The message names the variable and the providers there are."""
    with pytest.raises(ConfigError, match=f"{name}.*'openai'.*'midjourney'"):
        load_settings({name: "midjourney"})


def test_a_remote_model_has_no_size(tmp_path):
    """It takes no memory here, so a figure would keep other models out for nothing."""
    text = '[[models]]\nid = "a"\nsource = "gpt-5"\nengine = "openai"\nrequired_gb = 4\n'
    with pytest.raises(ConfigError, match="an openai model is not loaded here"):
        load_settings(write(tmp_path, text))
