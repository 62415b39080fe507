"""What operators and their machines ask a running proxy: is it alive, should it get traffic."""

from __future__ import annotations

import time
from typing import Final

from trioproxy import __version__
from trioproxy.scheduler import Scheduler
from trioproxy.upstream import Upstream


class Probes:
    """Liveness and readiness."""

    def __init__(self, scheduler: Scheduler, upstream: Upstream) -> None:
        self._scheduler = scheduler
        self._upstream = upstream
        self._began: Final = time.monotonic()
        self.serving = False
        """Whether start-up is over."""

    def health(self) -> dict[str, object]:
        """The process lives; what else is useful to see at a glance."""
        return {"status": "ok", "version": __version__, "uptime_seconds": round(time.monotonic() - self._began, 3)}

    def ready(self) -> tuple[dict[str, object], int]:
        """Whether new requests are welcome, and why not: the body and the HTTP status."""
        if not self.serving:
            reason = "starting"
        elif self._scheduler.closed:
            reason = "draining"
        elif self._upstream.known_out:
            reason = "the upstream cannot be reached"
        else:
            return {"status": "ready", "running": self._scheduler.running, "queued": self._scheduler.queued}, 200
        return {"status": "not ready", "reason": reason}, 503
