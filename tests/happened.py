"""Made-up events for the demo's tests."""

from __future__ import annotations

from pathlib import Path

from trioproxy.demo.lines import Stage
from trioproxy.demo.scenarios import SCENARIOS, SIMULATED
from trioproxy.demo.watch import Watch
from trioproxy.errors import Ending
from trioproxy.events import Ended, Queued, ScheduledRequest, Started
from trioproxy.priority import BY_NAME

STAGE = Stage(
    scenario=SCENARIOS["rush"],
    upstream_url="http://127.0.0.1:1/v1",
    addresses=("http://127.0.0.1:8080",),
    log_file=Path("logs/proxy.log"),
)


def request(level: str, who: str = "somebody.1") -> ScheduledRequest:
    """A simulated client's."""
    return ScheduledRequest(
        request_id=SIMULATED + who, method="POST", path="/v1/chat/completions", arrived=0.0, priority=BY_NAME[level]
    )


def by_hand(level: str) -> ScheduledRequest:
    """Somebody else's."""
    return ScheduledRequest(
        request_id="0123", method="POST", path="/v1/completions", arrived=0.0, priority=BY_NAME[level]
    )


def queued(watch: Watch, made: ScheduledRequest, at: float = 0.0) -> ScheduledRequest:
    """It waits."""
    watch(Queued(made, at))
    return made


def started(watch: Watch, made: ScheduledRequest, at: float = 0.0, waited: float = 0.0) -> ScheduledRequest:
    """It has a slot."""
    watch(Started(made, at, waited, was_queued=waited > 0))
    return made


def ended(
    watch: Watch, made: ScheduledRequest, ending: Ending, at: float = 8.0, *, waited: float = 0.0, ran: bool = False
) -> None:
    """It is over."""
    watch(Ended(made, at, ending, waited, started=ran))
