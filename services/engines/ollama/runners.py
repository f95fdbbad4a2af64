"""The processes in which a local Ollama holds its models: children of the server, identified by the file they open.

Recorded: `ollama runner --model models/blobs/sha256-328b… --port 42535`; from 0.30 on `llama-server --model …`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePath

import psutil


def runner_of(server_pid: int, blob: str) -> int | None:
    """Return the pid of the child that holds the weights in `blob`; None if there is none, or it can't be accessed."""
    wanted = PurePath(blob).name
    with suppress(psutil.Error):
        for child in psutil.Process(server_pid).children(recursive=True):
            with suppress(psutil.Error):
                if any(wanted in argument for argument in child.cmdline()):
                    return child.pid
    return None


def models_folder_of(server_pid: int) -> Path | None:
    """Return where a server keeps its files, from its environment; None if that can't be accessed."""
    try:
        environment = psutil.Process(server_pid).environ()
    except psutil.Error:
        return None
    home = environment.get("HOME")
    named = environment.get("OLLAMA_MODELS") or (f"{home}/.ollama/models" if home else None)
    return Path(named) if named else None


def resident(pid: int) -> tuple[int, int] | None:
    """Return a process's resident bytes, and how many of them are mapped or shared; None if it is gone."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return None
    if memory.rss == 0:
        return None  # a zombie
    return memory.rss, min(memory.shared, memory.rss)


def end_runner(pid: int) -> None:
    """Kill a runner that its server fails to end. The server notices and forgets it."""
    with suppress(psutil.Error):
        psutil.Process(pid).kill()
