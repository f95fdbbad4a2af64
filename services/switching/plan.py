"""What a switch would do, computed without doing it: what is unloaded, why, the time and memory it takes.

Pure: a function of the target, the ledger and what is loaded. Sizes are bytes, times seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.config import Strategy
from services.engines.port import HOST_DEVICE, Basis, Need, Rest


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is loaded, seen as something that could be unloaded.

    `keep` says in words why it must stay (a pin, a load under way), None when it may go. `spilled_bytes` are what it
    holds of this machine's RAM besides. `rest` is what it would keep asleep, None where it can't sleep or does already.
    `drain_seconds` is how long its answers under way may take to end.
    """

    model: str
    device: str
    bytes: int
    idle_seconds: float | None = None
    in_flight: int = 0
    reload_seconds: float | None = None
    drain_seconds: float = 0.0
    keep: str | None = None
    spilled_bytes: int = 0
    asleep: bool = False
    rest: Rest | None = None
    wake_seconds: float | None = None

    def held_on(self, device: str) -> int:
        if device == self.device:
            return self.bytes
        return self.spilled_bytes if device == HOST_DEVICE else 0


@dataclass(frozen=True, slots=True)
class Unload:
    """A model that has to go, what that frees on the plan's device, and how long it takes to bring it back.

    `sleeps`: it is put to sleep, because what it keeps then is not needed. `in_flight` requests end before it goes.
    """

    model: str
    frees_bytes: int
    idle_seconds: float | None
    reload_seconds: float | None
    sleeps: bool = False
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Blocked:
    """A model that could make room but stays, and why."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What switching to `target` takes. Infeasible plans unload nothing; `alternatives` would fit instead."""

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

    @property
    def freed_bytes(self) -> int:
        return sum(u.frees_bytes for u in self.unload)

    @property
    def after_available_bytes(self) -> int:
        return self.available_bytes + self.freed_bytes - self.required_bytes


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another model that could be switched to instead."""

    model: str
    need: Need


@dataclass(frozen=True, slots=True)
class Room:
    """Memory as measured: free and in all on the target's device, and free on the host, for what is put to sleep."""

    available_bytes: int
    total_bytes: int
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
    """Choose what to unload so that `need` fits.

    Models that answer somebody right now go last, those asleep first; those that must stay, never. What was chosen
    first but turned out not to be needed is kept after all, so that no plan unloads more than it has to. What goes is
    put to sleep where that frees enough too, and the host has room for it.
    """
    device = need.device
    candidates = [m for m in loaded if (m.device == device or m.held_on(device)) and m.model != target]
    may_go = [m for m in candidates if _keeps(m, rules.auto_unload) is None]
    may_go.sort(key=lambda m: (m.in_flight > 0, not m.asleep, *_RANKS[rules.strategy](m), m.model))
    freeable = sum(m.held_on(device) for m in may_go)
    short = need.bytes - room.available_bytes
    feasible = short <= freeable
    named = [m for m in loaded if m.model == rules.instead_of != target and m.keep is None]
    rest = [m for m in may_go if m not in named]
    freed = sum(m.held_on(device) for m in named)
    chosen = [*named, *_enough(rest, short - freed, device)] if feasible else []
    spare = sum(m.held_on(device) for m in chosen) - short
    return Plan(
        target=target,
        feasible=feasible,
        device=device,
        required_bytes=need.bytes,
        memory_basis=need.basis,
        available_bytes=room.available_bytes,
        total_bytes=room.total_bytes,
        freeable_bytes=freeable,
        unload=tuple(_unloads(chosen, device, spare, room.host_available_bytes)),
        blocked_by=tuple(_blocked(candidates, rules.auto_unload)) if not feasible else (),
        estimated_seconds=None if load_seconds is None else load_seconds + sum(m.drain_seconds for m in chosen),
        alternatives=() if feasible else _alternatives(target, need, room.available_bytes + freeable, others),
    )


def refusal(plan: Plan) -> str:
    """Why an infeasible plan can't be carried out, and what to do, for people."""
    room = plan.available_bytes + plan.freeable_bytes
    parts = [
        f"{plan.target} needs {say_gb(plan.required_bytes)} ({plan.memory_basis}), but at most {say_gb(room)} of "
        f"{say_gb(plan.total_bytes)} can be made available."
    ]
    if plan.blocked_by:
        parts.append("Kept: " + "; ".join(f"{b.model} ({b.reason})" for b in plan.blocked_by) + ".")
    if plan.alternatives:
        parts.append(f"The largest model that would fit is {plan.alternatives[0]}.")
    else:
        parts.append("Close other programs or raise the memory budget to make room.")
    return " ".join(parts)


def say_gb(size: int) -> str:
    """Bytes for people: decimal GB with one digit, MB below one GB."""
    return f"{size / 1e9:.1f} GB" if size >= 999_500_000 else f"{size / 1e6:.0f} MB"


def _keeps(model: Loaded, auto_unload: bool) -> str | None:
    if model.keep is not None:
        return model.keep
    return None if auto_unload else "unloading without being asked is switched off"


def _blocked(candidates: Sequence[Loaded], auto_unload: bool) -> list[Blocked]:
    reasons = ((m.model, _keeps(m, auto_unload)) for m in candidates)
    return [Blocked(model, reason) for model, reason in reasons if reason is not None]


def _enough(ranked: Sequence[Loaded], short: int, device: str) -> list[Loaded]:
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
    """How each of them goes: asleep as long as there is room for what it keeps then, else stopped.

    Nobody is put to sleep into the memory that the plan is to make free: that of the host, for an embedded model.
    """
    for model in chosen:
        frees = model.held_on(device)
        rest = model.rest if device != HOST_DEVICE else None
        keeps = rest.keeps_bytes if rest is not None and model.device == device else 0
        if rest is not None and keeps <= min(spare, frees) and rest.host_bytes <= host_spare:
            spare -= keeps
            host_spare -= rest.host_bytes
            yield Unload(model.model, frees - keeps, model.idle_seconds, model.wake_seconds, True, model.in_flight)
        else:
            yield Unload(model.model, frees, model.idle_seconds, model.reload_seconds, False, model.in_flight)


def _alternatives(target: str, need: Need, room: int, others: Sequence[Alternative]) -> tuple[str, ...]:
    fitting = [o for o in others if o.model != target and o.need.device == need.device and o.need.bytes <= room]
    fitting.sort(key=lambda o: (-o.need.bytes, o.model))
    return tuple(o.model for o in fitting[:3])
