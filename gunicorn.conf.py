"""One gevent worker: jobs, limits and the relay's connections live in its memory.

Nothing imported here may open a socket or import ssl before gevent has patched it (no preload for the same reason).
"""

import fcntl
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from services.config import ConfigError, load_settings

try:
    settings = load_settings()
except ConfigError as error:
    sys.exit(str(error))

bind = f"{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
workers = 1
worker_class = "worker.Worker"
worker_connections = 2000
preload_app = False
wsgi_app = "wsgi:app"
control_socket_disable = True
graceful_timeout = 10
timeout = 60
keepalive = 75
loglevel = "warning"
proc_name = "switchyard"

_lock = None


def on_starting(_server):
    """Hold the state directory for as long as we run: two copies would fight over the same models."""
    global _lock
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    path = settings.state_dir / "lock"
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        sys.exit(
            f"Switchyard is already running on the state folder {settings.state_dir.resolve()} (process "
            f"{lock.read().strip() or 'unknown'}). Stop it first, or give this copy its own SWITCHYARD_STATE_DIR and "
            "SWITCHYARD_PORT."
        )
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    _lock = lock


def post_worker_init(worker):
    """Start the services, and let them go when the worker is told to stop: streams must not hold it up."""
    import gevent

    services = worker.app.callable.extensions["switchyard"]
    services.start()
    services.restart.possible = True

    def leave_in_time():
        while worker.alive:
            if services.restart.due:
                worker.alive = False  # the arbiter starts another one in its place
            gevent.sleep(0.1)
        services.close()
        worker.hang_up()

    gevent.spawn(leave_in_time)
    print(f"Switchyard is at http://{bind}", flush=True)


def worker_exit(_server, worker):
    """The last chance to stop every model."""
    app = getattr(worker.app, "callable", None)
    if app is not None:
        app.extensions["switchyard"].close()


def on_exit(_server):
    """The app goes for good: no engine stays that nobody could unload, such as when a worker could not start again."""
    if _lock is None:
        return  # the engines there are another copy's
    from services.engines.processes import ProcessRegistry

    registry = ProcessRegistry(settings.state_dir)
    registry.end_leftovers()
    for engine in registry.engines():
        registry.end(engine)
