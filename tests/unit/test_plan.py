"""The rules for what a switch unloads."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.engines.port import Need, SleepFootprint, Usage
from services.memory.ledger import Account, Holding, Reading, account
from services.memory.programs import Program
from services.switching.plan import Alternative, Loaded, Plan, Room, UnloadRules, make_plan, refusal

STRATEGIES = ("largest_first", "oldest_first", "preserve_favorites", "cheapest_reload")
GB = 10**9

loaded_models = st.lists(
    st.builds(
        Loaded,
        model=st.uuids().map(str),
        device=st.sampled_from(["gpu0", "gpu1"]),
        bytes=st.integers(0, 100 * GB),
        idle_seconds=st.none() | st.floats(0, 1e6),
        in_flight=st.integers(0, 3),
        reload_seconds=st.none() | st.floats(0, 1e3),
        keep_reason=st.none() | st.just("it is pinned"),
        asleep=st.booleans(),
        sleep_footprint=st.none() | st.builds(SleepFootprint, st.integers(0, 60 * GB), st.integers(0, 60 * GB)),
    ),
    max_size=8,
    unique_by=lambda m: m.model,
)


def device(name: str, installed: int, free: int, budget: int | None = None, ours: int = 0) -> Account:
    """A device with `free` free bytes, `ours` held by our models, and the rest by other programs."""
    total = installed if budget is None else min(installed, budget)
    reading = Reading(name, name, "host", total, free, budget_bytes=budget, installed_bytes=installed)
    return account(reading, [Holding("ours", name, Usage(name, ours))])


def host_plan(required: int, memory: Account, loaded: list[Loaded], others: tuple[Alternative, ...] = ()) -> Plan:
    """A plan for the host's memory, in bytes."""
    need = Need("host", required, "declared")
    return make_plan("target", need, Room(memory), loaded, UnloadRules("largest_first"), others=others)


def plan_for(need: int, available: int, loaded: list[Loaded], **options: object) -> Plan:
    rules = {name: options.pop(name) for name in ("strategy", "auto_unload", "instead_of") if name in options}
    room = Room(device("gpu0", 200 * GB, available), options.pop("host_available_bytes", 0))  # type: ignore[arg-type]
    return make_plan(
        "target",
        Need("gpu0", need, "declared"),
        room,
        loaded,
        UnloadRules(**{"strategy": "largest_first", **rules}),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )


@given(st.integers(0, 200 * GB), st.integers(0, 100 * GB), loaded_models, st.sampled_from(STRATEGIES))
def test_a_feasible_plan_frees_enough_without_an_unnecessary_unload(need, available, loaded, strategy):
    """The unloaded models suffice, and without any single one of them there would be too little."""
    plan = plan_for(need, available, loaded, strategy=strategy)
    if plan.feasible:
        assert available + plan.freed_bytes >= need
        stopped = plan_for(need, available, [replace(m, sleep_footprint=None) for m in loaded], strategy=strategy)
        for kept in stopped.unload:
            assert available + stopped.freed_bytes - kept.frees_bytes < need
    else:
        assert plan.unload == ()
        assert available + plan.freeable_bytes < need


@given(st.integers(0, 200 * GB), st.integers(0, 100 * GB), loaded_models, st.sampled_from(STRATEGIES))
def test_models_that_must_stay_are_never_unloaded(need, available, loaded, strategy):
    """Pinned models and models on other devices stay loaded."""
    plan = plan_for(need, available, loaded, strategy=strategy)
    by_id = {m.model: m for m in loaded}
    for unload in plan.unload:
        model = by_id[unload.model]
        assert model.device == "gpu0"
        assert model.keep_reason is None


@given(st.integers(1, 200 * GB), loaded_models)
def test_nothing_is_unloaded_when_auto_unload_is_off(need, loaded):
    """With auto_unload off a plan either fits without unloading, or is refused with the reason."""
    plan = plan_for(need, need - 1, loaded, auto_unload=False)
    assert plan.unload == ()
    assert not plan.feasible


@given(st.integers(0, 200 * GB), st.integers(0, 100 * GB), loaded_models, st.integers(0, 100 * GB))
def test_sleep_never_takes_memory_that_the_target_needs(need, available, loaded, host):
    """The same models make room as without sleep, and what they keep asleep fits on both devices."""
    plan = plan_for(need, available, loaded, host_available_bytes=host)
    stopped = plan_for(need, available, [replace(m, sleep_footprint=None) for m in loaded], host_available_bytes=host)
    assert [u.model for u in plan.unload] == [u.model for u in stopped.unload]
    assert plan.feasible == stopped.feasible
    by_id = {m.model: m for m in loaded}
    asleep = [by_id[u.model].sleep_footprint for u in plan.unload if u.sleeps]
    assert sum(kept.host_bytes for kept in asleep) <= host
    for unload in plan.unload:
        kept = by_id[unload.model].sleep_footprint if unload.sleeps else None
        assert unload.frees_bytes == by_id[unload.model].bytes - (kept.device_bytes if kept else 0) >= 0
    if plan.feasible:
        assert available + plan.freed_bytes >= need


def test_a_model_sleeps_where_there_is_room_for_what_it_keeps():
    """The plan then has the time that waking takes."""
    model = Loaded(
        "a", "gpu0", 40 * GB, reload_seconds=60, wake_seconds=4, sleep_footprint=SleepFootprint(2 * GB, 30 * GB)
    )
    (unload,) = plan_for(30 * GB, 0, [model], host_available_bytes=30 * GB).unload
    assert (unload.sleeps, unload.frees_bytes, unload.reload_seconds) == (True, 38 * GB, 4)
    (unload,) = plan_for(39 * GB, 0, [model], host_available_bytes=30 * GB).unload
    assert (unload.sleeps, unload.frees_bytes, unload.reload_seconds) == (False, 40 * GB, 60)


def test_sleeping_models_are_stopped_before_running_ones():
    """Stopping a small sleeping model, if that suffices, is preferred to unloading a large running one."""
    loaded = [Loaded("runs", "gpu0", 40 * GB), Loaded("sleeps", "gpu0", 2 * GB, asleep=True)]
    assert [u.model for u in plan_for(1 * GB, 0, loaded).unload] == ["sleeps"]
    assert [u.model for u in plan_for(30 * GB, 0, loaded).unload] == ["runs"]


def test_no_model_sleeps_for_a_target_in_host_memory():
    """A target in host memory would lose that memory to the sleeping model."""
    spilled = Loaded("spilled", "gpu0", 10 * GB, spilled_bytes=8 * GB, sleep_footprint=SleepFootprint(GB, GB))
    plan = make_plan(
        "target",
        Need("host", 6 * GB, "declared"),
        Room(device("host", 16 * GB, 0), host_available_bytes=16 * GB),
        [spilled],
        UnloadRules("largest_first"),
    )
    assert [(u.model, u.frees_bytes, u.sleeps) for u in plan.unload] == [("spilled", 8 * GB, False)]


def test_largest_first_unloads_one_large_model_rather_than_many_small_ones():
    """Seed 001's default: the fewest operations."""
    loaded = [Loaded("small", "gpu0", 3 * GB), Loaded("large", "gpu0", 40 * GB), Loaded("tiny", "gpu0", 1 * GB)]
    assert [u.model for u in plan_for(30 * GB, 0, loaded).unload] == ["large"]


def test_oldest_first_unloads_the_longest_idle():
    """The least recently used model is unloaded first, whatever its size."""
    loaded = [Loaded("fresh", "gpu0", 40 * GB, idle_seconds=5), Loaded("old", "gpu0", 10 * GB, idle_seconds=900)]
    assert [u.model for u in plan_for(8 * GB, 0, loaded, strategy="oldest_first").unload] == ["old"]


def test_cheapest_reload_unloads_the_fastest_to_reload():
    """A model with an unknown load time counts as expensive."""
    loaded = [Loaded("unknown", "gpu0", 9 * GB), Loaded("quick", "gpu0", 9 * GB, reload_seconds=2)]
    assert [u.model for u in plan_for(8 * GB, 0, loaded, strategy="cheapest_reload").unload] == ["quick"]


def test_a_busy_model_is_unloaded_last():
    """An idle model is unloaded before a busy one, even if it is smaller."""
    loaded = [Loaded("busy", "gpu0", 40 * GB, in_flight=1), Loaded("idle", "gpu0", 10 * GB)]
    assert [u.model for u in plan_for(8 * GB, 0, loaded).unload] == ["idle"]


def test_a_refusal_names_what_blocks_it_and_the_largest_model_that_fits():
    """The message has the figures, the reason and an alternative."""
    plan = plan_for(
        150 * GB,
        10 * GB,
        [Loaded("pinned-one", "gpu0", 90 * GB, keep_reason="it is pinned")],
        others=[
            Alternative("fits", Need("gpu0", 9 * GB, "declared")),
            Alternative("huge", Need("gpu0", 99 * GB, "declared")),
        ],
    )
    assert plan.alternatives == ("fits",)
    words = refusal(plan)
    for expected in ("150.0 GB", "10.0 of 200.0 GB", "pinned-one (it is pinned)", "fits"):
        assert expected in words


def test_a_refusal_names_the_budget_if_it_is_the_limit():
    """With the value that would suffice, because the machine itself has enough memory."""
    memory = device("host", 64 * GB, 50 * GB, budget=10 * GB, ours=3 * GB)
    plan = host_plan(9_010_000_000, memory, [Loaded("stays", "host", 3 * GB, keep_reason="it is pinned")])
    assert [limit.kind for limit in plan.limits] == ["memory_budget_gb"]
    words = refusal(plan)
    assert "The setting memory_budget_gb limits all models together to 10.0 GB. Raise it to at least 12.1" in words
    assert "stays (it is pinned)" in words
    assert "rograms" not in words


def test_a_refusal_names_other_programs_if_free_memory_is_the_limit():
    """By name, with the memory they hold; a setting that has no effect is not mentioned."""
    plan = host_plan(9 * GB, device("host", 16 * GB, 5 * GB), [])
    (limit,) = plan.limits
    assert (limit.kind, limit.bytes, limit.short_bytes) == ("other_programs", 11 * GB, 4 * GB)
    named = replace(limit, programs=(Program("blender", 8 * GB, (7,)), Program("tabs", 2 * GB, (8, 9))))
    assert named.words == (
        "Other programs hold 11.0 GB, the largest of them blender (process 7, 8.0 GB) and tabs (2 processes, 2.0 GB). "
        "Close some of them, so that 4.0 GB more is free."
    )
    assert "memory_budget_gb" not in refusal(plan)


def test_a_refusal_names_both_limits_if_both_apply():
    """A budget of 10 GB, and 8 of 16 GB held by other programs."""
    plan = host_plan(12 * GB, device("host", 16 * GB, 8 * GB, budget=10 * GB), [])
    assert [(limit.kind, limit.bytes, limit.short_bytes) for limit in plan.limits] == [
        ("memory_budget_gb", 10 * GB, 2 * GB),
        ("other_programs", 8 * GB, 4 * GB),
    ]


def test_a_refusal_names_a_device_that_is_too_small():
    """Neither closing programs nor a larger budget would help."""
    plan = host_plan(40 * GB, device("host", 16 * GB, 8 * GB, budget=10 * GB), [])
    assert [limit.words for limit in plan.limits] == ["host has 16.0 GB in all: choose a smaller model."]


def test_other_programs_are_not_blamed_for_what_a_pinned_model_holds():
    """The other programs' memory would not be enough, and unloading the pinned model would."""
    memory = device("host", 24 * GB, 7 * GB, ours=16 * GB)
    plan = host_plan(10 * GB, memory, [Loaded("stays", "host", 16 * GB, keep_reason="it is pinned")])
    assert (plan.limits, [b.model for b in plan.blocked_by]) == ((), ["stays"])


@given(
    st.integers(1, 100 * GB),
    st.integers(1, 100 * GB),
    st.integers(0, 100 * GB),
    st.none() | st.integers(1, 120 * GB),
    loaded_models,
)
def test_every_refusal_and_only_a_refusal_names_a_limit(required, installed, free, budget, loaded):
    """It names blocking models or limits; each limit's missing amount is correct. Feasible plans name none."""
    loaded = [replace(m, device="host") for m in loaded]
    memory = device("host", installed, min(free, installed), budget, sum(m.bytes for m in loaded))
    plan = host_plan(required, memory, loaded)
    assert bool(plan.limits or plan.blocked_by) is not plan.feasible
    for limit in plan.limits:
        if limit.kind == "memory_budget_gb" and limit.short_bytes is not None:
            assert limit.bytes + limit.short_bytes <= installed
        if limit.kind == "other_programs" and limit.short_bytes is not None:
            assert limit.short_bytes <= limit.bytes


@given(st.integers(0, 50 * GB), st.integers(0, 100 * GB), loaded_models)
def test_a_replaced_model_is_unloaded_even_if_there_is_room(need, available, loaded):
    """Seed 002: the old model is always unloaded, once, and nothing else that isn't necessary."""
    old = Loaded(model="old", device="gpu0", bytes=5 * GB)
    plan = plan_for(need, available, [*loaded, old], instead_of="old")
    if plan.feasible:
        assert [u.model for u in plan.unload].count("old") == 1
        assert available + plan.freed_bytes >= need
    assert plan_for(need, available, [*loaded, old]).feasible == plan.feasible
