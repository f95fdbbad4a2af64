"""Computes what a switch would do: which models it unloads and why, and the time and memory it takes.

Pure: a function of the target, the ledger and what is loaded. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from services.config import Strategy
from services.engines.port import HOST_DEVICE, Basis, Need, SleepFootprint
from services.memory.ledger import Account
from services.memory.programs import Program
from services.sizes import format_part, format_size
from services.text import join_names


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model as a candidate for unloading.

    `keep_reason` says why it must stay (pinned, being loaded), None if it may be unloaded. `spilled_bytes` is the part
    of it in host RAM because it did not fit on its GPU. `sleep_footprint` is what it would hold asleep, None if it
    can't sleep or already does. `drain_seconds` is how long its requests in flight are expected to take.
    """

    model: str
    device: str
    bytes: int
    idle_seconds: float | None = None
    in_flight: int = 0
    reload_seconds: float | None = None
    drain_seconds: float = 0.0
    keep_reason: str | None = None
    spilled_bytes: int = 0
    asleep: bool = False
    sleep_footprint: SleepFootprint | None = None
    wake_seconds: float | None = None

    def held_on(self, device: str) -> int:
        if device == self.device:
            return self.bytes
        return self.spilled_bytes if device == HOST_DEVICE else 0


@dataclass(frozen=True, slots=True)
class Unload:
    """A model to unload, the bytes this frees on the plan's device, and the time to load it again.

    `sleeps`: it is put to sleep instead, because the memory it keeps asleep is not needed. `in_flight` requests finish
    first.
    """

    model: str
    frees_bytes: int
    idle_seconds: float | None
    reload_seconds: float | None
    sleeps: bool = False
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Blocked:
    """A model on the device that must stay, and why."""

    model: str
    reason: str


LimitKind = Literal["memory_budget_gb", "other_programs", "device_size"]


@dataclass(frozen=True, slots=True)
class Limit:
    """One of the limits that keep a model out.

    `bytes` is the budget, what other programs hold, or what the device has in all. `short_bytes` is how much more of
    it would do; None where changing this limit alone can't make room. `programs` are the largest of the other programs,
    where their names are known.
    """

    kind: LimitKind
    device: str
    bytes: int
    short_bytes: int | None = None
    programs: tuple[Program, ...] = ()

    @property
    def words(self) -> str:
        """What it is, and what to do about it."""
        size, short = format_size(self.bytes), self.short_bytes
        if self.kind == "device_size":
            return f"{self.device} has {size} in all: choose a smaller model."
        if self.kind == "other_programs":
            advice = "" if short is None else f" Close some of them, so that {format_size(short)} more is free."
            return f"{other_programs(self.bytes, self.programs)}{advice}"
        advice = "" if short is None else f" Raise it to at least {_setting(self.bytes + short)} to make room."
        return f"The setting memory_budget_gb limits all models together to {size}.{advice}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What it takes to make `target` ready.

    An infeasible plan unloads nothing. It names the models that stay (`blocked_by`) and the `limits` that keep the
    target out, at least one of both, and models that would fit instead (`alternatives`).
    """

    target: str
    feasible: bool
    device: str
    required_bytes: int
    memory_basis: Basis
    available_bytes: int
    total_bytes: int
    freeable_bytes: int
    unload: tuple[Unload, ...] = ()
    blocked_by: tuple[Blocked, ...] = ()
    estimated_seconds: float | None = None
    alternatives: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()

    @property
    def freed_bytes(self) -> int:
        return sum(u.frees_bytes for u in self.unload)

    @property
    def after_available_bytes(self) -> int:
        return self.available_bytes + self.freed_bytes - self.required_bytes


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another model that could be loaded instead, and the memory it needs."""

    model: str
    need: Need


@dataclass(frozen=True, slots=True)
class Room:
    """Measured memory: the account of the target's device, and what is free on the host for models put to sleep."""

    account: Account
    host_available_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UnloadRules:
    """What may be unloaded, and in which order. `instead_of` names a model that is unloaded in any case."""

    strategy: Strategy
    auto_unload: bool = True
    instead_of: str | None = None


Rank = Callable[[Loaded], tuple[float, ...]]

_RANKS: dict[Strategy, Rank] = {
    "largest_first": lambda m: (-m.bytes,),
    "oldest_first": lambda m: (-(m.idle_seconds or 0.0),),
    "preserve_favorites": lambda m: (-m.bytes,),
    "cheapest_reload": lambda m: (m.reload_seconds if m.reload_seconds is not None else float("inf"), -m.bytes),
}


def make_plan(
    target: str,
    need: Need,
    room: Room,
    loaded: Sequence[Loaded],
    rules: UnloadRules,
    *,
    load_seconds: float | None = None,
    others: Sequence[Alternative] = (),
) -> Plan:
    """Choose what to unload so that `need` fits on its device.

    Sleeping models are unloaded first and models with requests in flight last; those with a `keep_reason` never. A
    model chosen early that turns out not to be needed stays, so that no plan unloads more than necessary. A model is
    put to sleep instead of stopped where that frees enough and the host has room for it.
    """
    device, memory = need.device, room.account
    candidates = [m for m in loaded if (m.device == device or m.held_on(device)) and m.model != target]
    unloadable = [m for m in candidates if _keep_reason(m, rules.auto_unload) is None]
    unloadable.sort(key=lambda m: (m.in_flight > 0, not m.asleep, *_RANKS[rules.strategy](m), m.model))
    freeable = sum(m.held_on(device) for m in unloadable)
    short = need.bytes - memory.available_bytes if need.bytes else 0
    feasible = short <= freeable
    named = [m for m in loaded if m.model == rules.instead_of != target and m.keep_reason is None]
    remaining = [m for m in unloadable if m not in named]
    freed = sum(m.held_on(device) for m in named)
    chosen = [*named, *_choose_enough(remaining, short - freed, device)] if feasible else []
    spare = sum(m.held_on(device) for m in chosen) - short
    return Plan(
        target=target,
        feasible=feasible,
        device=device,
        required_bytes=need.bytes,
        memory_basis=need.basis,
        available_bytes=memory.available_bytes,
        total_bytes=memory.total_bytes,
        freeable_bytes=freeable,
        unload=tuple(_unloads(chosen, device, spare, room.host_available_bytes)),
        blocked_by=tuple(_blocked(candidates, rules.auto_unload)) if not feasible else (),
        estimated_seconds=None if load_seconds is None else load_seconds + sum(m.drain_seconds for m in chosen),
        alternatives=() if feasible else _alternatives(target, need, memory.available_bytes + freeable, others),
        limits=() if feasible else tuple(_limits(need.bytes, memory, freeable, candidates)),
    )


def refusal(plan: Plan) -> str:
    """Return the message for an infeasible plan: why it can't be carried out, and what to do."""
    room = plan.available_bytes + plan.freeable_bytes
    parts = [
        f"{plan.target} needs {format_size(plan.required_bytes)} ({plan.memory_basis}), but at most "
        f"{format_part(room, plan.total_bytes)} can be made available."
    ]
    if plan.blocked_by:
        parts.append("Kept: " + "; ".join(f"{b.model} ({b.reason})" for b in plan.blocked_by) + ".")
    parts += [limit.words for limit in plan.limits]
    if plan.alternatives:
        parts.append(f"The largest model that would fit is {plan.alternatives[0]}.")
    return " ".join(parts)


def other_programs(held_bytes: int, programs: Sequence[Program]) -> str:
    """Return a sentence about what other programs hold, with the names of the largest where they are known."""
    names = join_names([f"{p.name} ({p.place}, {format_size(p.bytes)})" for p in programs])
    return f"Other programs hold {format_size(held_bytes)}" + (f", the largest of them {names}." if names else ".")


def _keep_reason(model: Loaded, auto_unload: bool) -> str | None:
    if model.keep_reason is not None:
        return model.keep_reason
    return None if auto_unload else "unloading without being asked is switched off"


def _blocked(candidates: Sequence[Loaded], auto_unload: bool) -> list[Blocked]:
    reasons = ((m.model, _keep_reason(m, auto_unload)) for m in candidates)
    return [Blocked(model, reason) for model, reason in reasons if reason is not None]


def _choose_enough(ranked: Sequence[Loaded], short: int, device: str) -> list[Loaded]:
    chosen: list[Loaded] = []
    for model in ranked:
        if sum(m.held_on(device) for m in chosen) >= short:
            break
        chosen.append(model)
    surplus = sum(m.held_on(device) for m in chosen) - short
    for model in reversed(list(chosen)):
        if model.held_on(device) <= surplus:
            chosen.remove(model)
            surplus -= model.held_on(device)
    return chosen


def _unloads(chosen: Sequence[Loaded], device: str, spare: int, host_spare: int) -> Iterator[Unload]:
    """Decide for each model whether it sleeps, while there is room for what it keeps asleep, or is stopped.

    On the host device no model is put to sleep: its weights would stay in the memory that the plan is to free.
    """
    for model in chosen:
        frees = model.held_on(device)
        footprint = model.sleep_footprint if device != HOST_DEVICE else None
        keeps = footprint.device_bytes if footprint is not None and model.device == device else 0
        if footprint is not None and keeps <= min(spare, frees) and footprint.host_bytes <= host_spare:
            spare -= keeps
            host_spare -= footprint.host_bytes
            yield Unload(model.model, frees - keeps, model.idle_seconds, model.wake_seconds, True, model.in_flight)
        else:
            yield Unload(model.model, frees, model.idle_seconds, model.reload_seconds, False, model.in_flight)


def _limits(required: int, account: Account, freeable: int, candidates: Sequence[Loaded]) -> Iterator[Limit]:
    """What keeps it out besides models that stay.

    A device that is too small as a whole is the one limit that counts: nothing that people close or set helps then.
    Other programs count unless unloading the models that stay would be enough.
    """
    name, installed = account.name, account.installed_bytes
    kept = sum(m.held_on(account.id) for m in candidates) - freeable
    over_budget = 0
    if account.budget_bytes is not None and account.budget_left_bytes is not None:
        over_budget = required - account.budget_left_bytes - freeable
    over_free = required - account.free_bytes - freeable
    others = account.all_other_bytes
    crowded = over_free > 0 and others > 0 and (others >= over_free or kept < over_free)
    if required > installed or not (over_budget > 0 or crowded or kept):
        yield Limit("device_size", name, installed)
        return
    if account.budget_bytes is not None and over_budget > 0:
        enough = account.budget_bytes + over_budget <= installed
        yield Limit("memory_budget_gb", name, account.budget_bytes, over_budget if enough else None)
    if crowded:
        yield Limit("other_programs", name, others, over_free if others >= over_free else None)


def _setting(size: int) -> str:
    """A size as the settings have it, in GB with one digit: rounded up, since less would not do."""
    return f"{math.ceil(size / 1e8) / 10:.1f}"


def _alternatives(target: str, need: Need, room: int, others: Sequence[Alternative]) -> tuple[str, ...]:
    fitting = [o for o in others if o.model != target and o.need.device == need.device and o.need.bytes <= room]
    fitting.sort(key=lambda o: (-o.need.bytes, o.model))
    return tuple(o.model for o in fitting[:3])
