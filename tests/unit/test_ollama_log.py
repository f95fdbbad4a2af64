"""Parsing what Ollama's log says about a load."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engines.ollama.log import LoadLog, evidence_in, first_cause
from services.engines.port import Evidence

LINES = (
    'time=2026-11-21T03:13:35.777Z level=INFO source=server.go:1385 msg="waiting for llama runner to start"\n'
    'time=2026-11-21T03:13:35.800Z level=DEBUG source=server.go:1400 msg="model load progress 0.27"\n'
    'time=2026-11-21T03:13:35.900Z level=DEBUG source=server.go:1400 msg="model load progress 0.81"\n'
    'time=2026-11-21T03:13:36.028Z level=INFO source=server.go:1432 msg="llama runner started in 0.27 seconds"\n'
)
SAID = [
    Evidence("loading_weights", 0.27, "27 % of the weights"),
    Evidence("loading_weights", 0.81, "81 % of the weights"),
    Evidence("initializing_gpu", 1.0),
]


@given(st.lists(st.integers(0, len(LINES)), max_size=8))
def test_the_split_of_a_log_changes_nothing(cuts):
    """A read can end anywhere, even in the middle of a line."""
    log = LoadLog()
    edges = [0, *sorted(cuts), len(LINES)]
    said = [e for a, b in pairwise(edges) for e in log.feed(LINES[a:b])]
    assert said == SAID


def test_later_versions_with_another_server_name_are_parsed():
    """From 0.30 on the runner is called llama-server."""
    line = 'time=… level=INFO source=server.go:1 msg="llama-server started in 1.02 seconds"'
    assert evidence_in(line) == Evidence("initializing_gpu", 1.0)


@given(st.text(max_size=200))
def test_other_lines_are_ignored(line):
    """For any log line, a fraction stays between 0 and 1."""
    evidence = evidence_in(line)
    assert evidence is None or evidence.fraction is None or 0 <= evidence.fraction <= 1


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            "llama runner process has terminated: error loading model: missing tensor 'blk.2.attn_k.weight'\n"
            "panic: unable to load model: models/blobs/sha256-c383",
            "error loading model: missing tensor 'blk.2.attn_k.weight'",
        ),
        (
            "model requires more system memory (8.0 GiB) than is available",
            "model requires more system memory (8.0 GiB) than is available",
        ),
        ("", "Ollama gave no reason"),
    ],
)
def test_the_first_cause_is_reported_without_the_panic(error, cause):
    """Recorded errors of 0.24.0."""
    assert first_cause(error) == cause
