"""What a start of the app imports: each package costs every start its time and every console its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.console import ROOT, Console, put_empty_database

AVOIDED = {
    "rich": "structlog imports it where a test tool has installed it",
    "pygments": "rich imports it",
    "sqlalchemy.orm": "a quarter of SQLAlchemy; Core is enough (docs/decisions/0026-sqlalchemy-core.md)",
    "alembic": "needed only to change a database's tables",
    "docker": "needed only with a vLLM model",
    "requests": "docker imports it",
    "huggingface_hub": "its child process imports it",
}


def test_the_app_imports_no_package_that_it_needs_only_at_times(tmp_path: Path) -> None:
    """In the environment of a test's console, which is thereby a user's; and from the second start on."""
    console = Console(tmp_path)
    put_empty_database(console.state)
    program = "from gevent import monkey; monkey.patch_all(); import sys, wsgi; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | console.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [name for name in run.stdout.split() if name in AVOIDED] == []
