"""What `ollama pull` 0.24.0 draws on stderr: frames of rows, ten a second, with escape codes even into a pipe."""

from __future__ import annotations

import sys
import threading
import time

from .wire import human_bytes

WIDTH = 80
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Spinner:
    def __init__(self, message: str) -> None:
        self._message = message
        self._begun = time.monotonic()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def row(self) -> str:
        if self._stopped:
            return f"{self._message} "
        turn = int((time.monotonic() - self._begun) / 0.1)
        return f"{self._message} {SPINNER[turn % len(SPINNER)]} "


class Bar:
    """The bar of one layer. Its speed comes from one sample a second, the last ten of them; unknown before two."""

    def __init__(self, message: str, total: int, initial: int) -> None:
        self._message = message
        self._total = total
        self._current = initial
        self._seen: list[tuple[float, int]] = []
        self._stopped = initial >= total

    def set(self, value: int) -> None:
        self._current = min(value, self._total)
        self._stopped = self._stopped or self._current >= self._total
        now = time.monotonic()
        if not self._seen or now - self._seen[-1][0] > 1:
            self._seen = [*self._seen, (now, value)][-10:]

    def row(self) -> str:
        share = self._current / self._total if self._total else 0.0
        front = f"{self._message} {share * 100:3.0f}%"
        rate = self._rate()
        total = f"{human_bytes(self._total):>6}"
        sizes = f"{total}{'':7}" if self._stopped else f"{human_bytes(self._current):>6}/{total}"
        if self._stopped or rate <= 0:
            speed = " " * 18
        else:
            left = _duration(int((self._total - self._current) / rate))
            speed = f"  {human_bytes(int(rate)):>6}/s  {left:>6}"
        room = WIDTH - len(front) - len(sizes) - len(speed) - 5
        cells = int(room * share)
        return f"{front} ▕{'█' * cells}{' ' * (room - cells)}▏ {sizes}{speed}"

    def _rate(self) -> float:
        """Bytes per second."""
        if len(self._seen) < 2:
            return 0.0
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        seconds = round(last - first)
        return (after - before) / seconds if seconds else 0.0


def _duration(seconds: int) -> str:
    if seconds >= 360_000:
        return "99h+"
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60}m"
    return f"{seconds // 60}m{seconds % 60}s" if seconds >= 60 else f"{seconds}s"


class Display:
    """Draws its rows every 100 ms until it is stopped, then once more followed by a newline."""

    def __init__(self) -> None:
        self._rows: list[Spinner | Bar] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._height = 0
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def add(self, row: Spinner | Bar) -> None:
        with self._lock:
            self._rows.append(row)

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        for row in self._rows:
            if isinstance(row, Spinner):
                row.stop()
        self._draw("\n")

    def _tick(self) -> None:
        while not self._end.wait(0.1):
            self._draw("")

    def _draw(self, behind: str) -> None:
        with self._lock:
            up = "\033[A" * (self._height - 1)
            rows = "\n".join(f"{row.row()}\033[K" for row in self._rows)
            self._height = len(self._rows)
        frame = f"\033[?2026h\033[?25l{up}\033[1G{rows}\033[?25h\033[?2026l{behind}"
        sys.stderr.buffer.write(frame.encode())
        sys.stderr.buffer.flush()
