"""What happens to requests, as frozen facts, and how they reach whoever watches.

Each field is documented once, here; log keys and metric labels carry the same names. Times named `at` and `arrived`
are readings of one monotonic clock in seconds, everything named `..._seconds` is a duration. This module knows nothing
of who publishes and who listens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum, auto

from trioproxy import priority
from trioproxy.errors import Ending


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestFacts:
    """What is known of a request when it has arrived. Compared by identity: two with the same id are two."""

    request_id: str
    """Ours; the client's own `X-Request-Id` where it sent a usable one."""
    method: str
    path: str
    """Without the query, as the client sent it."""
    arrived: float
    """When its head was read."""
    key: str | None = None
    """The name of the client key that it came with; None where there are none."""
    bytes_in: int | None = None
    """The body's size, where it has been read or announced."""
    model: str | None = None
    """The body's `model`, where there is one."""
    stream: bool | None = None
    """The body's `stream`, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScheduledRequest(RequestFacts):
    """A request that needs a slot."""

    priority: int
    pool: str = "default"
    deadline: float = math.inf
    """The client's own deadline (`X-Request-Timeout`), on the clock of `arrived`."""

    @property
    def priority_level(self) -> str:
        """The name of the priority's level."""
        return priority.level(self.priority)


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far serving a request has come; whoever serves it writes down here what it did."""

    http_status: int | None = None
    """The status of the head that was sent to the client, or of our own answer."""
    upstream_status: int | None = None
    """The status that the upstream answered with."""
    upstream_seconds: float | None = None
    """From the request's sending to the last byte of the answer, or to the failure."""
    first_byte_at: float | None = None
    """When the answer's head had been passed on to the client, on the clock of `arrived`."""
    upstream_whole: bool = False
    """Whether the upstream's answer arrived to its end."""
    bytes_out: int = 0
    """Bytes of the body passed on to the client."""
    error: str | None = None
    """What failed, for people."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A request waits for a slot."""

    request: ScheduledRequest
    at: float


@dataclass(frozen=True, slots=True)
class Started:
    """A request has got a slot."""

    request: ScheduledRequest
    at: float
    queue_seconds: float
    was_queued: bool
    """False if a slot was free when it asked."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A scheduled request is over: exactly one of these for each."""

    request: ScheduledRequest
    at: float
    ending: Ending
    queue_seconds: float | None
    """How long it waited; None for one that was neither queued nor started."""
    started: bool
    """Whether it had a slot, which is free again."""
    progress: Progress | None = None
    """What serving it came to; None if it never started."""

    @property
    def total_seconds(self) -> float:
        """From arrival to the end."""
        return self.at - self.request.arrived

    @property
    def time_to_first_byte_seconds(self) -> float | None:
        """From arrival until the upstream's answer began to reach the client; None if it never did."""
        if self.progress is None or self.progress.first_byte_at is None:
            return None
        return self.progress.first_byte_at - self.request.arrived

    @property
    def overhead_seconds(self) -> float | None:
        """What neither waiting nor the upstream took of the whole: reading the request, deciding, logging, answering.

        None if nothing was sent upstream.
        """
        if self.progress is None or self.progress.upstream_seconds is None:
            return None
        return max(self.total_seconds - (self.queue_seconds or 0.0) - self.progress.upstream_seconds, 0.0)


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """The number of slots or of places in the queue is another from now on."""

    pool: str
    at: float
    permits: int
    max_queue: int


@dataclass(frozen=True, slots=True)
class PassedThrough:
    """A request that needs no slot is over."""

    request: RequestFacts
    at: float
    ending: Ending
    progress: Progress


@dataclass(frozen=True, slots=True)
class Refused:
    """A request was turned away before scheduling: malformed, too large, nowhere to go."""

    request: RequestFacts
    at: float
    ending: Ending
    error: str


class WebSocketOutcome(StrEnum):
    """What ended a WebSocket session: the label `outcome` of `openai_proxy_websocket_sessions_total`."""

    CLIENT_CLOSED = auto()
    """The client said that it closes."""
    CLIENT_GONE = auto()
    """The client went away without a word, stopped reading, or was cut off."""
    UPSTREAM_CLOSED = auto()
    UPSTREAM_REFUSED = auto()
    """The upstream answered the handshake with something else than 101, which went to the client."""
    UPSTREAM_ERROR = auto()
    """The upstream could not be reached, broke off, or sent nonsense."""
    TOO_LARGE = auto()
    """A message was larger than `server.websocket_max_message_size`."""
    IDLE = auto()
    """No message either way for `server.websocket_idle_timeout`."""
    SHUTDOWN = auto()
    REJECTED = auto()
    """By the proxy: too many, or while shutting down."""
    PROXY_ERROR = auto()


@dataclass(frozen=True, slots=True)
class WebSocketOpening:
    """A WebSocket session has one of the places, and its handshake goes on to the upstream."""

    request: RequestFacts
    at: float


@dataclass(slots=True, kw_only=True)
class WebSocketProgress:
    """How far a WebSocket session has come; whoever serves it writes down here what it did."""

    outcome: WebSocketOutcome = WebSocketOutcome.CLIENT_GONE
    """What ended it, or is going to."""
    http_status: int | None = None
    """What the client's handshake was answered with."""
    close_code: int | None = None
    """By whoever closed first; None if nobody said one (RFC 6455 section 7.4)."""
    messages_in: int = 0
    """Messages from the client that were passed on."""
    messages_out: int = 0
    """Messages from the upstream that were passed on."""
    bytes_in: int = 0
    """The size of the client's messages, bytes or characters."""
    bytes_out: int = 0
    """The size of the upstream's messages, bytes or characters."""
    error: str | None = None
    """What failed, for people."""


@dataclass(frozen=True, slots=True)
class WebSocketClosed:
    """A WebSocket session is over, or its handshake was refused: exactly one of these for each."""

    request: RequestFacts
    at: float
    opened: bool
    """Whether it had one of the places, which is free again."""
    progress: WebSocketProgress


Event = Queued | Started | Ended | CapacityChanged | PassedThrough | Refused | WebSocketOpening | WebSocketClosed
Listener = Callable[[Event], None]


class Publisher:
    """Hands every event to every listener, in order, at once.

    A listener must return quickly and must not wait for I/O. One that raises hurts nobody else: `on_failure` is called
    with it and the exception, and it is given later events as before, since a metric that stops is worse than one
    event lost.
    """

    def __init__(
        self, listeners: Iterable[Listener] = (), on_failure: Callable[[Listener, Exception], None] | None = None
    ):
        self._listeners = tuple(listeners)
        self._on_failure = on_failure

    def publish(self, event: Event) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:
                if self._on_failure is not None:
                    with suppress(Exception):  # a slot may just have been granted: nothing must get out of here
                        self._on_failure(listener, error)
