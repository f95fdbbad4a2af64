"""How many files and sockets the app may have open at once, which is what the connections it takes are limited by."""

from __future__ import annotations

import resource

OTHERS = 500
"""What is open besides clients and the connections to engines for them: pipes, logs, the database, idle connections."""
LEAST = 100
"""Connections without which it would serve nobody; it tries its luck then."""


def raise_for(connections: int) -> int:
    """Raise this process's limit so that it can answer on so many connections; how many it can take.

    Each may need a second descriptor, for the engine that answers on it. The limit is raised as far as the system lets
    us (the hard limit): the usual 1024 ends at 500 streams, and whoever comes then is not even refused.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + OTHERS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    return max(LEAST, (soft - min(OTHERS, soft // 4)) // 2)
