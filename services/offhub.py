"""Native calls that block (NVML, large files) and would freeze a gevent worker: run beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def off_hub(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` in the hub's threadpool when this process runs on gevent, directly otherwise.

    What it raises is raised here. It must not start processes, nor touch what greenlets share without a lock.
    """
    monkey = sys.modules.get("gevent.monkey")  # not imported means not patched
    if monkey is None or not monkey.is_module_patched("threading"):
        return function(*args, **kwargs)
    import gevent

    return cast(R, gevent.get_hub().threadpool.apply(function, args, kwargs))
