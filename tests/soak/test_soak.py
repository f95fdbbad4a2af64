"""A short soak, so that the long one works when it is wanted."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.soak.faults import FAULTS, FULL_DISK
from tests.soak.operations import OPERATIONS
from tests.soak.oracle import Figures
from tests.soak.record import FAULT_SECONDS, Record
from tests.soak.run import CLIENTS, choose, soak


@pytest.mark.timeout(600)
def test_every_promise_holds_in_a_short_soak(tmp_path: Path):
    """Sixty operations with a restart, a `kill -9` of the app, a full disk and faults of engines; nothing is lost."""
    seen: list[str] = []
    record = soak(tmp_path, 60, 7, seen.append, [fault for fault in FAULTS if fault.name == FULL_DISK])
    assert not record.broken, record.summary()
    assert record.done == 60
    assert [line.partition(":")[0] for line in seen][-2:] == ["all is well", FULL_DISK]
    assert "0 rows streaming" in seen[-1]


def test_an_error_of_the_state_needs_a_fault_that_explains_it():
    """While that is there, and for a moment after; with its own codes and no others."""
    record = Record()
    began = time.monotonic()
    assert not record.explained("database_locked", began)
    with record.standing_fault(frozenset({"database_locked"}), breaks=False):
        assert record.explained("database_locked", time.monotonic())
        assert not record.explained("state_unwritable", time.monotonic())
        assert not record.disturbed_since(began)
    assert record.explained("database_locked", began)
    assert not record.explained("database_locked", time.monotonic() + 2 * FAULT_SECONDS)


def test_growth_is_told_by_what_has_grown():
    """A worker that keeps what it has is flat; one that keeps a descriptor for each of a hundred operations is not."""
    before = Figures(1, 100_000_000, 30, 0, 8, 30, 0)
    assert replace(before, descriptors=35, greenlets=33).grown(before) is None
    assert replace(before, descriptors=130).grown(before) == "100 descriptors more"
    assert replace(before, rss=400_000_000, greenlets=80).grown(before) == "50 greenlets more, 300 MB more"


def test_a_seed_decides_what_every_client_does():
    """The same names in the same order, and the same dice for each; all that there is comes up."""
    first, again, other = (choose(seed, 0, 6000) for seed in (7, 7, 8))
    assert [(name, dice.random()) for name, dice in first] == [(name, dice.random()) for name, dice in again]
    assert [name for name, _ in first] != [name for name, _ in other]
    assert {name for name, _ in first} == set(OPERATIONS)
    assert sum(len(choose(7, client, 1000)) for client in range(CLIENTS)) == 1000
