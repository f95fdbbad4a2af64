"""Raises the limit on open files (RLIMIT_NOFILE), which bounds the number of client connections."""

from __future__ import annotations

import resource

OTHERS = 500
"""Descriptors for everything else than clients and their engines: pipes, logs, database, idle connections."""
LEAST = 100
"""Minimum of connections to accept, even where the limit on open files is too low for them."""


def raise_for(connections: int) -> int:
    """Raise this process's limit for so many client connections; return how many it can accept.

    Each client may need a second descriptor, for its connection to an engine. The limit is raised up to the hard limit
    at most. The usual limit of 1024 allows about 500 streams, and a client beyond it does not even get a refusal.
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
