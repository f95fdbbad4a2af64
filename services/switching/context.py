"""What the parts of the switching package share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.catalog import Catalog
from services.config import Settings
from services.engines.port import Engine
from services.pins import CurrentPins
from services.preferences import CurrentPreferences
from services.scheduling import Scheduler
from services.switching.events import Board


@dataclass(frozen=True, slots=True)
class SwitchingContext:
    """Settings, preferences, pins, catalogue, engines by name, the board to publish on, the scheduler to wait with."""

    settings: Settings
    preferences: CurrentPreferences
    pins: CurrentPins
    board: Board
    catalog: Catalog
    engines: Mapping[str, Engine]
    scheduler: Scheduler
