"""The memory ledger of a device adds up for any readings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.engines.port import Usage
from services.memory.ledger import Holding, Reading, account

GB = 10**9
SIZES = st.integers(0, 64 * GB)


@st.composite
def usages(draw: st.DrawFn, device: str) -> Usage | None:
    size = draw(SIZES)
    return draw(st.sampled_from([None, Usage(device, size, draw(st.integers(0, size)))]))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Reading, list[Holding]]:
    kind = draw(st.sampled_from(["gpu", "host"]))
    total = draw(SIZES)
    budget = total if kind == "host" and draw(st.booleans()) else None
    installed = None if budget is None else total + draw(SIZES)
    reading = Reading("d", "Device", kind, total, draw(SIZES), budget, installed_bytes=installed)
    holdings = [
        Holding(f"m{n}", device, draw(usages(device)), draw(SIZES))
        for n, device in enumerate(draw(st.lists(st.sampled_from(["d", "elsewhere"]), max_size=4)))
    ]
    return reading, holdings


@given(situations())
def test_the_parts_add_up_to_the_device(situation: tuple[Reading, list[Holding]]) -> None:
    """ours + reserved + other + available equals the total if ours fits into it, and no part is negative."""
    reading, holdings = situation
    result = account(reading, holdings)
    ours = sum(size for _, size in result.ours)
    assert min(result.reserved_bytes, result.other_bytes, result.available_bytes, result.used_bytes) >= 0
    rest = result.reserved_bytes + result.other_bytes + result.available_bytes
    assert rest == max(0, reading.total_bytes - ours)


@given(situations())
def test_available_memory_is_really_free(situation: tuple[Reading, list[Holding]]) -> None:
    """Available is never more than the driver's free memory minus reservations of loads under way."""
    reading, holdings = situation
    result = account(reading, holdings)
    assert result.available_bytes + result.reserved_bytes <= reading.free_bytes


@given(situations())
def test_available_is_the_smaller_of_free_memory_and_remaining_budget(
    situation: tuple[Reading, list[Holding]],
) -> None:
    """So that an error can name the one that is short; a budget that limits nothing is not reported."""
    reading, holdings = situation
    result = account(reading, holdings)
    limits = [result.free_bytes, *([] if result.budget_left_bytes is None else [result.budget_left_bytes])]
    assert result.available_bytes == min(limits)
    assert (result.budget_bytes is None) == (result.budget_left_bytes is None)
    assert result.budget_bytes is None or result.budget_bytes < result.installed_bytes


def test_other_programs_memory_is_reported_in_full_and_within_the_budget() -> None:
    """16 GB, a budget of 10, 4 free: others hold 12, of which 6 count against the budget."""
    reading = Reading("host", "System memory", "host", 10 * GB, 4 * GB, 10 * GB, installed_bytes=16 * GB)
    result = account(reading, [])
    assert (result.other_bytes, result.all_other_bytes, result.available_bytes) == (6 * GB, 12 * GB, 4 * GB)


def test_mapped_weights_count_as_held_on_the_host() -> None:
    """Pages of a loaded model's file, which the kernel calls available, are not offered to another model."""
    reading = Reading("host", "System memory", "host", 16 * GB, 12 * GB)
    result = account(reading, [Holding("a", "host", Usage("host", 5 * GB, mapped_bytes=4 * GB))])
    assert result.ours == (("a", 5 * GB),)
    assert result.available_bytes == 8 * GB
    assert result.other_bytes == 3 * GB


def test_a_gpu_has_no_mapped_pages() -> None:
    """On a GPU, memory that the driver calls free is available."""
    reading = Reading("GPU-1", "GPU", "gpu", 24 * GB, 12 * GB)
    result = account(reading, [Holding("a", "GPU-1", Usage("GPU-1", 10 * GB, mapped_bytes=4 * GB))])
    assert (result.available_bytes, result.other_bytes) == (12 * GB, 2 * GB)


def test_a_budget_caps_available_memory() -> None:
    """Models share the budget even if the machine has more; other programs don't use it up."""
    reading = Reading("host", "System memory", "host", 8 * GB, 60 * GB, budget_bytes=8 * GB)
    result = account(reading, [Holding("a", "host", Usage("host", 3 * GB))])
    assert (result.available_bytes, result.other_bytes) == (5 * GB, 0)


def test_without_a_budget_the_rest_is_other_programs() -> None:
    """Memory that is neither ours nor free is held by other programs."""
    reading = Reading("host", "System memory", "host", 16 * GB, 9 * GB)
    result = account(reading, [Holding("a", "host", Usage("host", 3 * GB))])
    assert (result.available_bytes, result.other_bytes) == (9 * GB, 4 * GB)


def test_a_load_under_way_reserves_the_rest_of_its_need() -> None:
    """The part of a load's need that it doesn't hold yet is reserved; the part that it holds is counted once."""
    reading = Reading("host", "System memory", "host", 16 * GB, 10 * GB)
    loading = Holding("a", "host", Usage("host", 2 * GB), reserved_bytes=5 * GB)
    result = account(reading, [loading])
    assert (result.reserved_bytes, result.available_bytes) == (3 * GB, 7 * GB)


def test_unknown_usage_counts_as_other_programs() -> None:
    """An instance with unknown usage counts as zero; the driver's reading still counts its memory as used."""
    reading = Reading("GPU-1", "GPU", "gpu", 24 * GB, 14 * GB)
    result = account(reading, [Holding("a", "GPU-1", None)])
    assert result.ours == (("a", 0),)
    assert (result.available_bytes, result.other_bytes) == (14 * GB, 10 * GB)
