"""What the demo plays, as data: who comes how often, how the upstream behaves, and what the proxy is set to.

Pure: this module must not know how any of it is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from trioproxy.demo.upstream_options import UpstreamOptions

SIMULATED: Final = "sim."
"""What the ids of these clients' requests begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Clients of one kind. They arrive at random (Poisson), one by one or many at once."""

    name: str
    """Letters, digits and `-`: it becomes a part of request ids."""
    per_second: float
    """Requests on average, those that come back after a refusal not counted."""
    at_once: int = 1
    """Requests that arrive in the same moment; the moments are rarer accordingly."""
    header: str | None = None
    """What the header `X-Priority` says; None: it is not sent."""
    field: str | int | None = None
    """What the body's `priority` says; None: it is not there."""
    stream: bool = False
    patience: float = math.inf
    """Seconds until the client leaves, whether it has its answer or not."""
    stops_reading: bool = False
    """Whether it asks for an endless stream and never reads any of it; it needs a finite `patience`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One world: its clients, its upstream, and the proxy between them. All times are in seconds."""

    name: str
    about: str
    """What it shows, for `--help`."""
    crowds: tuple[Crowd, ...]
    """In this order they appear, the least urgent first, so that the queue is full when the others come."""
    upstream: UpstreamOptions
    slots: int = 4
    places: int = 12
    queue_timeout: float = 8.0
    """Short enough for the lowest level to run into it."""
    first_byte_timeout: float = 60.0
    idle_timeout: float = 60.0
    client_write_timeout: float = 60.0
    appearance_seconds: float = 0.25
    """How long after one crowd the next one appears."""
    models_per_second: float = 0.5
    """How often somebody asks for the list of models, which is passed through and never waits."""
    backoff_seconds: float = 0.5
    """How long a client stays away after a failure that names no time, before its first retry; twice that before its
    second. OpenAI's SDKs do so."""
    speed: float = 1.0
    """By how much this world is faster than the one that was written down."""

    @property
    def seconds_per_request(self) -> float:
        """How long the upstream takes on average if nothing goes wrong."""
        return self.upstream.time_to_first_token + self.upstream.tokens / self.upstream.tokens_per_second

    @property
    def offered_load(self) -> float:
        """What the crowds ask for as a multiple of what the slots can serve, without retries and stopped readers."""
        asking = sum(crowd.per_second for crowd in self.crowds if not crowd.stops_reading)
        return asking * self.seconds_per_request / self.slots

    def at_speed(self, speed: float) -> Scenario:
        """The same world, `speed` times as fast: every duration shorter, every rate higher."""
        return replace(
            self,
            crowds=tuple(
                replace(crowd, per_second=crowd.per_second * speed, patience=crowd.patience / speed)
                for crowd in self.crowds
            ),
            upstream=replace(
                self.upstream,
                time_to_first_token=self.upstream.time_to_first_token / speed,
                tokens_per_second=self.upstream.tokens_per_second * speed,
            ),
            queue_timeout=self.queue_timeout / speed,
            first_byte_timeout=self.first_byte_timeout / speed,
            idle_timeout=self.idle_timeout / speed,
            client_write_timeout=self.client_write_timeout / speed,
            appearance_seconds=self.appearance_seconds / speed,
            models_per_second=self.models_per_second * speed,
            backoff_seconds=self.backoff_seconds / speed,
            speed=self.speed * speed,
        )


def _crowds(*, bulk: float, reports: float, production: float, chat: float, on_call: float) -> tuple[Crowd, ...]:
    """The usual clients, so many requests a second of each; the background ones come in batches."""
    return (
        Crowd(name="bulk-eval", per_second=bulk, at_once=max(round(3.5 * bulk), 1), field=10),
        Crowd(name="reports", per_second=reports, at_once=max(round(5 * reports), 1), header="low"),
        Crowd(name="production", per_second=production),
        Crowd(name="chat", per_second=chat, field="high", stream=True),
        Crowd(name="on-call", per_second=on_call, header="critical", stream=True),
    )


_USUAL: Final = UpstreamOptions(time_to_first_token=0.2, tokens=30, tokens_per_second=50)
_IMPATIENT: Final = Crowd(name="impatient-chat", per_second=0.2, header="65", stream=True, patience=0.5)
_STOPPED: Final = Crowd(name="stopped-reader", per_second=0.35, header="normal", patience=12.0, stops_reading=True)

_ALL: Final = (
    Scenario(
        name="calm",
        about="less than there is room for: hardly anybody waits",
        crowds=_crowds(bulk=0.6, reports=0.2, production=0.6, chat=0.4, on_call=0.3),
        upstream=_USUAL,
    ),
    Scenario(
        name="rush",
        about="nearly twice what can be served: the least urgent are evicted and rejected",
        crowds=(*_crowds(bulk=4.6, reports=0.8, production=1.4, chat=1.0, on_call=0.5), _IMPATIENT),
        upstream=_USUAL,
    ),
    Scenario(
        name="overload",
        about="four times what can be served: only the urgent get through",
        crowds=_crowds(bulk=12.0, reports=3.0, production=3.0, chat=1.8, on_call=0.8),
        upstream=_USUAL,
    ),
    Scenario(
        name="flaky",
        about="an upstream that fails, breaks off and hangs: clients see it, slots come free",
        crowds=_crowds(bulk=1.6, reports=0.6, production=1.2, chat=0.6, on_call=0.5),
        upstream=replace(_USUAL, error_rate=0.08, break_rate=0.06, hang_rate=0.05),
        first_byte_timeout=2.0,
        idle_timeout=2.0,
    ),
    Scenario(
        name="stopped",
        about="clients that stop reading a long stream: they are cut off, their slots come free",
        crowds=(*_crowds(bulk=2.0, reports=0.6, production=0.8, chat=0.6, on_call=0.4), _STOPPED),
        # As long an answer as usual, in more pieces: it fills the buffers of those who do not read within a second.
        upstream=replace(_USUAL, tokens=90, tokens_per_second=150),
        client_write_timeout=2.0,
    ),
)

SCENARIOS: Final[Mapping[str, Scenario]] = MappingProxyType({scenario.name: scenario for scenario in _ALL})
DEFAULT: Final = "rush"

SPEED_MIN: Final = 0.1
SPEED_MAX: Final = 10.0
"""Beyond that, one process can no longer play clients, proxy and upstream in time."""
