"""A console whose models folder is on a hanging network share: everything else works."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support.console import DEMO_MODELS, Console, wait_until
from tests.support.faults import Faults

MINI = DEMO_MODELS / "switchyard-mini.gguf"


def test_a_hanging_models_folder_delays_nothing_else(start_console: Callable[..., Console], tmp_path: Path) -> None:
    """Start, stop, pages, switches and answers work with the last listing; the problem is shown."""
    models = tmp_path / "models"
    models.mkdir()
    for name in ("one", "two"):
        shutil.copy(MINI, models / f"{name}.gguf")
    listed = '[[models]]\nid = "listed"\nsource = "two.gguf"\n'
    (tmp_path / "faults").mkdir()
    with Faults(tmp_path / "faults", models) as faults:
        with faults.hanging_models():
            console = start_console(models_dir=models, environment=faults.environment, toml=listed, standby="false")
            assert console.states() == {"listed": "failed"}
            assert "does not answer. Its models will be listed once it answers." in console.get("/models").text
            assert "its folder is slow" in console.model("listed")["error"]
            assert console.stop() == 0
        console.start()
        console.wait_for(lambda s: set(s["models"]) == {"one", "listed"}, "the models to be listed")
        console.switch("one")
        before = console.output()
        with faults.hanging_models():
            wait_until(lambda: "does not answer" in console.output().removeprefix(before), "the hang to be logged")
            assert console.states() == {"one": "running", "listed": "stopped"}
            console.switch("listed")
            assert console.ask("Hello").status_code == 200
            assert f"The models folder {models} does not answer." in console.get("/models").text
            shutil.copy(MINI, models / "three.gguf")
        console.wait_for(lambda s: "three" in s["models"], "the new file to be listed")
        wait_until(lambda: "The models folder" not in console.get("/models").text, "the notice to disappear")
        assert console.output().removeprefix(before).count("does not answer") == 1, (
            "it is logged once, not at every scan"
        )
        console.close()
