"""Configures gunicorn: one gevent worker, because jobs, limits and the relay's connections live in its memory.

Nothing imported here may open a socket or import ssl before gevent has patched it (no preload for the same reason).
"""

import gc
import os
import signal
import sys
from contextlib import suppress

gc.disable()  # until the imports are done: collections that find no garbage took a tenth of the start

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from server import file_limit, signals
from services import state_folder
from services.config import ConfigError, load_settings
from services.store import damage
from services.store.errors import StoreError

try:
    settings = load_settings()
except ConfigError as error:
    sys.exit(str(error))

CONNECTIONS = 2000
"""Limit of client connections at a time, idle ones included (`server/connection_limits.py`)."""

bind = f"{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
workers = 1
worker_class = "server.worker.Worker"
worker_connections = file_limit.raise_for(CONNECTIONS)
preload_app = False
wsgi_app = "wsgi:app"
control_socket_disable = True
graceful_timeout = 10
timeout = 60
keepalive = 75
loglevel = "warning"
proc_name = "switchyard"

ANSWERS_SECONDS = 1.0
"""How long a restart waits for unfinished answers."""
ORPHAN_SECONDS = 20
"""How long a worker without a master may take to end; then SIGALRM ends it, since no master is left to do so."""

_lock = None


def on_starting(server):
    """Lock the state directory while the app runs, because two copies would manage the same models.

    The worker inherits the lock, so it is released once both processes have ended, in whatever way.
    """
    global _lock
    if server.num_workers != 1:
        sys.exit("Switchyard runs in one worker: models, limits and connections live in its memory.")
    try:
        lock = state_folder.claim(settings.state_dir)
        damage.check(settings.state_dir / state_folder.DATABASE)
    except (state_folder.StateError, StoreError) as error:
        sys.exit(str(error))
    _lock = lock
    if worker_connections < CONNECTIONS:
        server.log.warning(
            "Only %s connections are taken at a time: the limit on open files is too low for %s. Raise it (ulimit -Hn, "
            "LimitNOFILE=, docker run --ulimit nofile=).",
            worker_connections,
            CONNECTIONS,
        )
    signals.arrange(server)


def when_ready(_server):
    """Enable garbage collection, without imported objects: visiting them would unshare pages from the worker."""
    gc.freeze()
    gc.enable()


def post_fork(_server, _worker):
    """Disable garbage collection until the worker has imported the app: it took a sixth of the start."""
    gc.disable()


def post_worker_init(worker):
    """Start the services, and close them as soon as the worker is told to stop, so that streams don't delay it."""
    import gevent

    from blueprints.compiled_templates import compile_changed

    gc.freeze()  # modules are never freed: collections need not visit them
    gc.enable()
    services = worker.app.callable.extensions["switchyard"]
    services.start()
    services.restart.possible = True

    def leave_in_time():
        while worker.alive:
            if worker.orphaned:
                signal.alarm(ORPHAN_SECONDS)
                services.restart.abandon()
                worker.alive = False
            elif services.restart.due:
                worker.await_answers(ANSWERS_SECONDS)
                worker.alive = False  # the arbiter starts a new worker
            gevent.sleep(0.1)
        services.close()
        worker.close_connections()

    gevent.spawn(leave_in_time)
    gevent.spawn(compile_changed, worker.app.callable)
    worker.take_over()
    with suppress(OSError):  # the terminal may be gone by the time of a restart
        print(f"Switchyard is at http://{bind}", flush=True)


def worker_exit(_server, worker):
    """Stop every model that is still running when the worker exits."""
    app = getattr(worker.app, "callable", None)
    if app is not None:
        app.extensions["switchyard"].close()


def on_exit(_server):
    """End engines left over when the app ends, such as after a worker that failed to restart."""
    if _lock is None:
        return  # the running engines belong to another copy of the app
    from services.engines.processes import ProcessRegistry

    registry = ProcessRegistry(settings.state_dir)
    registry.end_leftovers()
    for engine in registry.engines():
        registry.end(engine)
