"""The environment of a soak test: a console with healthy and faulty models, a shared Ollama, and the shared state."""

from __future__ import annotations

import random
import shutil
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.engines.processes import MARK_VARIABLE
from tests.support.console import DEMO_MODELS, FAKE_LLAMA_SERVER, Console, fake_model
from tests.support.faults import Faults
from tests.support.ollama import TINY_A, TINY_B, FakeOllama

DEMO = DEMO_MODELS / "switchyard-mini.gguf"
BUDGET_GB = 0.7
"""Room for four or five of the models: most switches have to unload one."""
COPIES = tuple(f"copy-{number}" for number in range(6))
"""GGUF files in the models folder that operations delete, remove and put back."""
HEALTHY = ("good", "second", "talker", "wide", "slow", "stubborn")
OLLAMA = ("tiny-a:latest", "tiny-b:latest")
DOCKED = "docked"
"""A vLLM model: its Docker is missing, or hangs."""
BAD = ("crasher", "mute", "late", "dies", DOCKED)
"""Models whose faults are configured from the beginning."""
HUGE = "huge"
DESCRIPTORS = 1024
"""The usual `ulimit -n`."""
UNKNOWN_MODEL = "unknown-model"
SETTINGS = {
    "drain_timeout_seconds": 5,
    "unload_timeout_seconds": 1,
    "memory_timeout_seconds": 5,
    "load_timeout_seconds": 4,
    "warm_up_timeout_seconds": 10,
    "queue_timeout_seconds": 90,
    "switch_rate_limit": "100000/minute",
    "memory_budget_gb": BUDGET_GB,
}


@dataclass
class Conversation:
    """A conversation and its accepted messages. The world's lock is held to change either."""

    id: str
    accepted: list[str] = field(default_factory=list)
    deleted: bool = False


class World:
    """The console, its models, its processes, and what all clients share."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.models.mkdir(parents=True)
        for name in COPIES:
            self.add_file(name)
        self._folder = folder
        self._opened = ExitStack()
        self.faults = Faults(folder / "faults", self.models)
        self.ollama = FakeOllama(folder / "ollama", {OLLAMA[0]: TINY_A, OLLAMA[1]: TINY_B})
        self.console = Console(
            folder,
            models_dir=self.models,
            toml=settings_file(confirm=False),
            environment={**self.faults.environment, "SWITCHYARD_OLLAMA_BASE_URL": self.ollama.url},
            descriptors=DESCRIPTORS,
            llamacpp_server=FAKE_LLAMA_SERVER,
            **SETTINGS,
        )
        self.url = self.console.url
        self.conversations: list[Conversation] = []
        self.switches_seen: list[str] = ["none-such"]
        self.lock = threading.Lock()

    def start(self) -> None:
        self._opened.enter_context(self.faults)
        self.ollama.start()
        self.console.start()

    def close(self) -> None:
        """End everything, whatever happened."""
        self.console.close()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.ollama.close()
        with suppress(OSError):  # the state folder's own file system is unmounted next; keep a copy for analysis
            shutil.copytree(self.faults.state, self._folder / "state", dirs_exist_ok=True)
        self._opened.close()

    def set_confirmation(self, wanted: bool) -> None:
        """Change the setting `confirm_before_unload`; it applies from the app's next start on."""
        config = Path(self.console.environment["SWITCHYARD_CONFIG"])
        config.write_text(settings_file(confirm=wanted), encoding="utf-8")

    def add_file(self, name: str) -> None:
        """Put one of the copies into the models folder, atomically."""
        draft = self.models / f"{name}.draft"
        shutil.copy(DEMO, draft)
        draft.replace(self.models / f"{name}.gguf")

    def remove_file(self, name: str) -> None:
        """Remove a copy's file without telling the console."""
        (self.models / f"{name}.gguf").unlink(missing_ok=True)

    def forget_conversations(self) -> None:
        """Mark all conversations as deleted, because their database was damaged."""
        with self.lock:
            for conversation in self.conversations:
                conversation.deleted = True

    def conversation(self, dice: random.Random) -> Conversation | None:
        """A random conversation that no client has deleted."""
        with self.lock:
            here = [c for c in self.conversations if not c.deleted]
            return dice.choice(here) if here else None

    # Processes.

    @property
    def worker(self) -> psutil.Process:
        """gunicorn's worker, which is the app."""
        assert self.console.process is not None
        return psutil.Process(self.console.process.pid).children()[0]

    def processes(self) -> list[psutil.Process]:
        """Live processes that this console, or an earlier run of it, has started: by their mark and state folder."""
        state = self.console.environment["SWITCHYARD_STATE_DIR"]
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if MARK_VARIABLE in environment and environment.get("SWITCHYARD_STATE_DIR") == state:
                    found.append(process)
        return found

    def engines(self) -> list[tuple[str, psutil.Process]]:
        """The live llama-servers, with the model of each."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                words = process.cmdline()
                if "--alias" in words:
                    found.append((words[words.index("--alias") + 1], process))
        return sorted(found, key=lambda pair: (pair[0], pair[1].pid))


def settings_file(*, confirm: bool) -> str:
    """The settings file: `confirm_before_unload`, and the listed models."""
    hold = {"required_gb": 0.2}
    return f"confirm_before_unload = {str(confirm).lower()}\n" + "".join(
        (
            fake_model("good", "slow_load:0.3", "hold:60", source=str(DEMO), **hold),
            fake_model("second", "slow_load:0.5", "hold:40", source=str(DEMO), **hold),
            fake_model("talker", "slow_tokens:0.1", "hold:60", source=str(DEMO), **hold),
            fake_model("wide", "hold:150", source=str(DEMO), required_gb=0.45),
            fake_model("slow", "slow_load:1.2", source=str(DEMO), **hold),
            fake_model("stubborn", "ignore_sigterm", source=str(DEMO), **hold),
            fake_model("crasher", "slow_load:0.4", "crash_loading", source=str(DEMO), **hold),
            fake_model("mute", "refuse_first", source=str(DEMO), **hold),
            fake_model("late", "never_ready", source=str(DEMO), required_gb=0.5),
            fake_model("dies", "crash_answering", source=str(DEMO), **hold),
            fake_model(HUGE, source=str(DEMO), required_gb=900),
            f'[[models]]\nid = "{DOCKED}"\nengine = "vllm"\nsource = "/models/{DOCKED}"\nrequired_gb = 2\n',
        )
    )
