"""Signals to a real gunicorn: always one worker and one owner of the state folder, and no model lost by accident."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

from tests.support.console import ROOT, Console, fake_model, free_port, wait_until

MINI = "switchyard-mini"
StartConsole = Callable[..., Console]


def test_signals_for_more_workers_or_another_master_are_refused(start_console: StartConsole) -> None:
    """SIGTTIN started a second worker with its own state, SIGUSR2 a second master. Now both are refused and logged."""
    console = start_console(standby="false")
    before = processes(console)
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2):
        master(console).send_signal(number)
        wait_until(lambda n=number: f"{n.name} is refused" in console.output(), f"{number.name} to be refused")
    worker(console).send_signal(signal.SIGUSR2)
    worker(console).send_signal(signal.SIGTTIN)
    assert console.get("/readyz").status_code == 200
    assert processes(console) == before


def test_sighup_restarts_the_app_and_keeps_its_models(start_console: StartConsole) -> None:
    """Like `/api/restart-api`. (SIGHUP unloaded everything.) The same engine answers through the new worker."""
    console = start_console(standby="false")
    console.switch(MINI)
    (engine,) = console.engines()
    old = worker(console)
    master(console).send_signal(signal.SIGHUP)
    wait_until(lambda: gone(old.pid), "the old worker to end")
    console.wait_for(lambda s: s["active_model"] == MINI, "the model to be adopted")
    assert [e.pid for e in console.engines()] == [engine.pid]
    assert console.ask("Hello").status_code == 200


def test_sighup_is_refused_during_a_switch(start_with_fakes: StartConsole) -> None:
    """Like `/api/restart-api`; the log says so, and the switch continues."""
    console = start_with_fakes(fake_model("slow", "slow_load:3"))
    old = worker(console)
    console.post("/v1/models/switch", {"target_model": "slow"})
    master(console).send_signal(signal.SIGHUP)
    wait_until(lambda: "The switch to slow would be lost" in console.output(), "the refusal to be logged")
    console.wait_for(lambda s: s["active_model"] == "slow", "the switch to end")
    assert worker(console) == old


def test_sighup_is_ignored_under_nohup(start_console: StartConsole) -> None:
    """`nohup` starts a program with SIGHUP ignored."""
    ours = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        console = start_console(standby="false")
    finally:
        signal.signal(signal.SIGHUP, ours)
    before = processes(console)
    for process in (master(console), worker(console)):
        process.send_signal(signal.SIGHUP)
    master(console).send_signal(signal.SIGUSR2)  # handled after the SIGHUP
    wait_until(lambda: "SIGUSR2 is refused" in console.output(), "the signals to be handled")
    assert console.get("/readyz").status_code == 200
    assert processes(console) == before


def test_closing_the_terminal_stops_the_app(start_console: StartConsole) -> None:
    """It kept running with port and lock held. Now everything ends in an orderly way, models included."""
    console = start_console(standby="false")
    console.stop()
    with terminal(console) as close:
        wait_until(lambda: answers(console), "the console in its terminal to answer")
        console.switch(MINI)
        (engine,) = console.engines()
        everything = [master(console), *console.children()]
        close()
        wait_until(lambda: all(gone(process.pid) for process in everything), "every process to end")
    assert gone(engine.pid)
    wait_until(lambda: free(console), "port and lock to be free")


def test_killing_only_the_master_frees_the_lock_and_loses_no_model(start_console: StartConsole) -> None:
    """The worker notices and ends as for a restart; the next run adopts the same engine."""
    console = start_console(standby="false")
    console.switch(MINI)
    (engine,) = console.engines()
    left = worker(console)
    assert console.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: gone(left.pid) and free(console), "the worker to end, and port and lock to be free")
    assert engine.is_running()
    console.start()
    console.wait_for(lambda s: s["active_model"] == MINI, "the model to be adopted")
    assert [e.pid for e in console.engines()] == [engine.pid]


def test_a_worker_aborted_by_its_master_keeps_its_models_loaded(start_console: StartConsole) -> None:
    """gunicorn aborts a hanging worker by SIGABRT and starts another, which adopts the same engine."""
    console = start_console(standby="false")
    console.switch(MINI)
    (engine,) = console.engines()
    old = worker(console)
    old.send_signal(signal.SIGABRT)
    wait_until(lambda: gone(old.pid), "the worker to end")
    wait_until(lambda: answers(console), "the next worker to answer")  # connections to the old one are closed
    console.wait_for(lambda s: s["active_model"] == MINI, "the model to be adopted")
    assert [e.pid for e in console.engines()] == [engine.pid]


def test_it_does_not_start_with_two_workers(tmp_path: Path) -> None:
    """Two would compete for the same models; the message says so."""
    environment = {"SWITCHYARD_STATE_DIR": str(tmp_path / "state"), "SWITCHYARD_PORT": str(free_port())}
    command = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "--workers", "2"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert "one worker" in run.stderr


def master(console: Console) -> psutil.Process:
    assert console.process is not None
    return psutil.Process(console.process.pid)


def worker(console: Console) -> psutil.Process:
    """The master's child process that isn't an engine."""
    engines = {engine.pid for engine in console.engines()}
    (found,) = (child for child in master(console).children() if child.pid not in engines)
    return found


def processes(console: Console) -> set[int]:
    return {child.pid for child in console.children()}


def gone(pid: int) -> bool:
    """Whether a process has ended. If its parent has ended too, another process reaps it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free(console: Console) -> bool:
    """Whether another copy could start: port and state folder lock are free."""
    with closing(socket.socket()) as probe, (console.folder / "state" / "lock").open("a") as lock:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", console.port))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def answers(console: Console) -> bool:
    try:
        return console.get("/readyz").status_code == 200
    except OSError:
        return False


@contextmanager
def terminal(console: Console) -> Iterator[Callable[[], None]]:
    """Run the console as a shell's job in a terminal, like `make run`; yield a function that closes the terminal."""
    ours, theirs = pty.openpty()
    shell = "import fcntl, subprocess, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); subprocess.call(sys.argv[1:])"
    command = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py"]
    session = subprocess.Popen(
        [sys.executable, "-c", shell, *command],
        cwd=ROOT,
        env={**os.environ, **console.environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    open_ends = [ours]

    def close() -> None:
        while open_ends:
            os.close(open_ends.pop())

    gunicorns: list[psutil.Process] = []
    try:
        wait_until(lambda: bool(psutil.Process(session.pid).children()), "gunicorn")
        gunicorns += psutil.Process(session.pid).children()
        console.process = gunicorns[0]  # type: ignore[assignment]
        yield close
    finally:
        close()
        for gunicorn in gunicorns:
            for process in [*gunicorn.children(recursive=True), gunicorn] if gunicorn.is_running() else []:
                process.kill()
        session.kill()
        session.wait()
        console.process = None
