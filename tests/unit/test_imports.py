"""Packages that the app imports at its start: each costs start time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.console import ROOT, Console, put_empty_database

SETTINGS_BYTES = 8_000_000
AVOIDED = {
    "rich": "structlog imports it where a test tool has installed it",
    "pygments": "rich imports it",
    "sqlalchemy.orm": "Core is enough (docs/decisions/0026-sqlalchemy-core.md)",
    "alembic": "needed only to change a database's tables",
    "docker": "needed only with a vLLM model",
    "requests": "docker imports it",
    "huggingface_hub": "its child process imports it",
    "openai": "needed only to call OpenAI for the Studio",
    "httpx2": "openai imports it",
    "markdown_it": "needed only to show a conversation",
    "nh3": "needed only to show a conversation",
}


def run(program: str, console: Console) -> list[str]:
    """The output of a program, as words, in the environment of a test's console, which is like a user's."""
    environment = os.environ | console.environment
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


def test_rarely_needed_packages_are_not_imported_at_the_start(tmp_path: Path) -> None:
    """From the second start on; the first creates the tables with Alembic."""
    console = Console(tmp_path)
    put_empty_database(console.state)
    loaded = run("from gevent import monkey; monkey.patch_all(); import sys, wsgi; print(*sys.modules)", console)
    assert [name for name in loaded if name in AVOIDED] == []


def test_the_settings_take_little_memory(tmp_path: Path) -> None:
    """A regular expression for model ids took 20 MB, in gunicorn's master and in the worker."""
    program = """
import psutil, pydantic
pydantic.create_model("Any", name=(str, pydantic.Field(pattern="^a*$")))
before = psutil.Process().memory_info().rss
import services.config
print(psutil.Process().memory_info().rss - before)
"""
    (grown,) = run(program, Console(tmp_path))
    assert int(grown) < SETTINGS_BYTES
