"""Who runs now, who waits, who must go.

`core` decides (pure), `limits` says how many may run and how fast slots come free (pure), `runtime` carries the
decisions out (trio). Nothing here knows HTTP.
"""

from trioproxy.scheduler.core import Core, Snapshot
from trioproxy.scheduler.limits import FixedLimit
from trioproxy.scheduler.queue import ShareLimits
from trioproxy.scheduler.runtime import Scheduler, Slot

__all__ = ["Core", "FixedLimit", "Scheduler", "ShareLimits", "Slot", "Snapshot"]
