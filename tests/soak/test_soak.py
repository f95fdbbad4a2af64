"""A short soak, so that the long one works when it is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.operations import OPERATIONS
from tests.soak.run import CLIENTS, choose, soak


@pytest.mark.timeout(600)
def test_every_promise_holds_in_a_short_soak(tmp_path: Path):
    """Sixty operations with a restart, a `kill -9` of the app and faults in between; nothing is lost or left."""
    seen: list[str] = []
    record = soak(tmp_path, 60, 7, seen.append)
    assert not record.broken, record.summary()
    assert record.done == 60
    assert len(seen) == 4


def test_a_seed_decides_what_every_client_does():
    """The same names in the same order, and the same dice for each; all that there is comes up."""
    first, again, other = (choose(seed, 0, 6000) for seed in (7, 7, 8))
    assert [(name, dice.random()) for name, dice in first] == [(name, dice.random()) for name, dice in again]
    assert [name for name, _ in first] != [name for name, _ in other]
    assert {name for name, _ in first} == set(OPERATIONS)
    assert sum(len(choose(7, client, 1000)) for client in range(CLIENTS)) == 1000
