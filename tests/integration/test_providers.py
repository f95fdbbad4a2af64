"""Providers of a running console: services that hang, and the watch."""

from __future__ import annotations

from tests.support.health_servers import hanging_url
from tests.support.stopwatch import Stopwatch


def test_the_status_is_answered_in_time_whatever_hangs(start_console):
    """Flux, vision and Ollama accept connections and never answer: no answer waits for them, and the pages least."""
    with hanging_url() as flux, hanging_url() as vision, hanging_url() as ollama:
        console = start_console(flux_api_url=flux, local_vision_api_url=vision, ollama_base_url=ollama)
        for path in ("/api/providers/status", "/api/providers/health"):
            watch = Stopwatch()
            said = console.get(path).json()["health"]
            assert watch.waited < 2
            assert {name: one["available"] for name, one in said.items()} == dict.fromkeys(
                ("ollama", "flux", "vision"), False
            )
            assert all("hangs" in said[name]["error"] for name in ("flux", "vision"))
        for path in ("/providers", "/fragments/providers"):
            watch = Stopwatch()
            assert "What answers" in console.get(path).text
            assert watch.waited < 1
