"""The ledger: each device's memory split into ours per instance, reserved by loads, other programs' and free.

Pure: no I/O, no clock. Figures are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.engines.port import HOST_DEVICE, Usage

DeviceKind = Literal["gpu", "host"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One device as the driver (NVML) or the kernel (psutil) reports it.

    `total_bytes` is what models may use: the installed memory (`installed_bytes`, None: the same), or less where the
    settings limit it (`budget_bytes`). `free_bytes` is what can still be allocated. `process_bytes` is memory per
    process id, where the driver reports it. `measured_at` is Unix seconds, None if unknown. `stale`: the driver did not
    answer a later query.
    """

    id: str
    name: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int
    budget_bytes: int | None = None
    process_bytes: Mapping[int, int] = field(default_factory=dict)
    measured_at: float | None = None
    stale: bool = False
    installed_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """Memory that an instance holds (`usage`, None if unknown) and that is reserved for it (`reserved_bytes`)."""

    model: str
    device: str
    usage: Usage | None
    reserved_bytes: int = 0


def holdings_of(model: str, device: str, usage: Usage | None, reserved_bytes: int) -> list[Holding]:
    """Return an instance's holdings: on its device, and on the host for what did not fit on its GPU."""
    held = [Holding(model, device, usage, reserved_bytes)]
    if usage is not None and usage.spilled_bytes and device != HOST_DEVICE:
        held.append(Holding(model, HOST_DEVICE, Usage(HOST_DEVICE, usage.spilled_bytes)))
    return held


@dataclass(frozen=True, slots=True)
class Account:
    """One device's memory, with ours + reserved + other + available = total.

    `available_bytes` is the smaller of two limits, both without reserved memory: `free_bytes`, what measures free of
    the installed memory (`installed_bytes`), and `budget_left_bytes`, what the budget (`budget_bytes`) leaves. Both
    budget figures are None without a budget, or with one that is no less than the installed memory.
    """

    id: str
    name: str
    kind: DeviceKind
    total_bytes: int
    ours: tuple[tuple[str, int], ...]
    reserved_bytes: int
    other_bytes: int
    available_bytes: int
    installed_bytes: int
    free_bytes: int
    budget_bytes: int | None = None
    budget_left_bytes: int | None = None

    @property
    def used_bytes(self) -> int:
        return self.total_bytes - self.available_bytes

    @property
    def all_other_bytes(self) -> int:
        """Memory of other programs in the installed memory; `other_bytes` is only their part of the budget."""
        ours = sum(size for _, size in self.ours)
        return max(0, self.installed_bytes - ours - self.reserved_bytes - self.free_bytes)


def account(reading: Reading, holdings: Sequence[Holding]) -> Account:
    """Split one device's memory. Holdings on other devices are ignored."""
    mine = [h for h in holdings if h.device == reading.id]
    ours = tuple((h.model, h.usage.bytes if h.usage else 0) for h in mine)
    ours_bytes = sum(size for _, size in ours)
    # The kernel counts mapped pages of our weights as available, but reclaiming them would evict a loaded model to
    # disk. So they count as ours. A GPU has no such pages.
    mapped_bytes = sum(h.usage.mapped_bytes for h in mine if h.usage) if reading.kind == "host" else 0
    # Our memory must not count as free too: readings from different moments overlap, and a budget caps the total.
    unclaimed = max(0, reading.total_bytes - ours_bytes)
    free = max(0, min(reading.free_bytes - mapped_bytes, unclaimed))
    pending = sum(max(0, h.reserved_bytes - size) for h, (_, size) in zip(mine, ours, strict=True))
    reserved = min(pending, free)
    installed = reading.total_bytes if reading.installed_bytes is None else reading.installed_bytes
    measured = min(reading.free_bytes - mapped_bytes, installed - ours_bytes)
    capped = reading.budget_bytes is not None and reading.budget_bytes < installed
    return Account(
        id=reading.id,
        name=reading.name,
        kind=reading.kind,
        total_bytes=reading.total_bytes,
        ours=ours,
        reserved_bytes=reserved,
        other_bytes=unclaimed - free,
        available_bytes=free - reserved,
        installed_bytes=installed,
        free_bytes=max(0, measured - pending),
        budget_bytes=reading.budget_bytes if capped else None,
        budget_left_bytes=max(0, unclaimed - pending) if capped else None,
    )
