"""Error of the estimated time left (ETA) while a model loads.

The fake engine loads a model five times, each time with another known duration (up to a tenth off the middle, as on a
disk that other programs use too): three quarters of it reading the file, one quarter without visible progress. Each
event of the switch's stream that has an `eta` is compared with the time that was really left; the figure is the median
relative error over the third to fifth load.

The stream rounds up to whole seconds: "4" stands for 3 to 4 s and counts as 3.5. The error that people see includes
that half second, which matters only for loads as short as these; the row reports it too. The last half second isn't
counted: any forecast then is a multiple of the time left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from bench.figures import Row
from bench.rig import SLOW_MODEL, Rig
from tests.support.console import Console

LOADS = (6.0, 5.5, 6.4, 5.7, 6.2)
SHORT_LOADS = (0.8, 0.8, 0.8)
LEARNED_AFTER = 2
FIGURE = "median error of the ETA after two loads"
LEAST_LEFT_SECONDS = 0.5
ROUNDING_SECONDS = 0.5
TARGET = 0.20


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds left as an event forecast them, and as they turned out."""

    said: float
    left: float

    def error(self, correction: float = 0.0) -> float:
        return abs(self.said - correction - self.left) / self.left


def measure(rig: Rig) -> Iterator[Row]:
    console = rig.fake_engine_console
    durations = SHORT_LOADS if rig.short else LOADS
    loads = [_load(rig, console, seconds) for seconds in durations]
    learned = [forecast for load in loads[LEARNED_AFTER:] for forecast in load]
    if not learned:
        yield Row(FIGURE, f"no forecast in {len(loads)} loads", f"< {TARGET:.0%}", met=False)
        return
    error = median(forecast.error(ROUNDING_SECONDS) for forecast in learned)
    as_shown = median(forecast.error() for forecast in learned)
    first = [forecast.error(ROUNDING_SECONDS) for forecast in loads[0]]
    first_said = f"{median(first):.0%} in the first load" if first else "none in the first load"
    yield Row(
        FIGURE,
        f"{error:.0%} ({len(learned)} forecasts in loads of about {median(durations):.0f} s; "
        f"{as_shown:.0%} with the rounding to whole seconds that people see; {first_said})",
        f"< {TARGET:.0%}",
        error < TARGET,
        {"error": error, "error_as_shown": as_shown, "forecasts": len(learned)},
    )


def _load(rig: Rig, console: Console, seconds: float) -> list[Forecast]:
    """Load the slow model once, then unload it; return the forecasts made during the load."""
    rig.load_plan.write_text(str(seconds))
    said: list[tuple[float, float]] = []
    for name, data in console.switch_stream(SLOW_MODEL):
        now = time.monotonic()
        if name == "error":
            raise RuntimeError(f"the slow model did not load: {data}")
        if data.get("eta") is not None:
            said.append((now, float(data["eta"])))
    ready = time.monotonic()
    console.post(f"/v1/models/{SLOW_MODEL}/stop").raise_for_status()
    return [Forecast(eta, ready - at) for at, eta in said if ready - at > LEAST_LEFT_SECONDS]
