"""A short soak test, which also keeps the long one working."""

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
def test_every_invariant_holds_in_a_short_soak(tmp_path: Path):
    """Sixty operations with a restart, a `kill -9` of the app, a full disk and engine faults violate no invariant."""
    seen: list[str] = []
    record = soak(tmp_path, 60, 7, seen.append, [fault for fault in FAULTS if fault.name == FULL_DISK])
    assert not record.violations, record.summary()
    assert record.done == 60
    assert [line.partition(":")[0] for line in seen][-2:] == ["no fault", FULL_DISK]
    assert "0 rows streaming" in seen[-1]


def test_a_state_error_is_accepted_only_with_a_fault_that_explains_it():
    """It is accepted during the fault and for a moment after it, and only with the fault's own codes."""
    record = Record()
    began = time.monotonic()
    assert not record.explained("database_locked", began)
    with record.standing_fault(frozenset({"database_locked"}), breaks=False):
        assert record.explained("database_locked", time.monotonic())
        assert not record.explained("state_unwritable", time.monotonic())
        assert not record.disturbed_since(began)
    assert record.explained("database_locked", began)
    assert not record.explained("database_locked", time.monotonic() + 2 * FAULT_SECONDS)


def test_growth_names_what_has_grown():
    """A stable worker reports no growth; one that keeps a descriptor for each of a hundred operations does."""
    before = Figures(1, 100_000_000, 30, 0, 8, 30, 0)
    assert replace(before, descriptors=35, greenlets=33).grown(before) is None
    assert replace(before, descriptors=130).grown(before) == "100 descriptors more"
    assert replace(before, rss=400_000_000, greenlets=80).grown(before) == "50 greenlets more, 300 MB more"


def test_a_seed_determines_what_every_client_does():
    """The same seed gives the same operations in the same order with the same random numbers; all operations occur."""
    first, again, other = (choose(seed, 0, 6000) for seed in (7, 7, 8))
    assert [(name, dice.random()) for name, dice in first] == [(name, dice.random()) for name, dice in again]
    assert [name for name, _ in first] != [name for name, _ in other]
    assert {name for name, _ in first} == set(OPERATIONS)
    assert sum(len(choose(7, client, 1000)) for client in range(CLIENTS)) == 1000
