"""Makes a server do the same for each request. Python imports it first, since `counting.py` puts it on the path.

Collections of garbage, timers and trio's coin fall into some requests and not into others: without this, a count of
fifteen requests is off by 1 %, and the count of a burst's chunk, a small difference of two such counts, by 10 %.
"""

from __future__ import annotations

import gc
from time import perf_counter

import trio._core._run as run

from trioproxy.observe import logs

SLOWER = 100
"""Counting slows the server down by nearly as much: timers must not fall into more requests than they do elsewhere."""


class SlowClock(run.SystemClock):
    """Trio's own, but slower."""

    def current_time(self) -> float:
        return self.offset + perf_counter() / SLOWER

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return (deadline - self.current_time()) * SLOWER


gc.disable()
run.SystemClock = SlowClock  # type: ignore[misc]
run._r.random = lambda: 1.0  # type: ignore[method-assign]  # by this coin, ready tasks run in order or in reverse
logs.GATHER_SECONDS = 0.0  # type: ignore[misc]  # how many lines are written together depends on the machine
