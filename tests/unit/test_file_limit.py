"""The limit on open files and connections; each test in a process of its own, because a hard limit can't be raised."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, resource
from server import file_limit
print(json.dumps([file_limit.raise_for(2000), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "limit"),
    [
        (1024, 16_384, 2000, 4500),
        (1024, 4096, 1798, 4096),
        (1024, 1024, 384, 1024),
        (16_384, 16_384, 2000, 16_384),
        (256, 256, 100, 256),
    ],
)
def test_the_limit_is_raised_and_connections_fit_into_it(soft, hard, connections, limit):
    """Two descriptors per connection, and some for everything else."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    assert json.loads(done.stdout) == [connections, limit]
