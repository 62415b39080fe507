"""Every way in which a request can end, in one table, and the answers that trioproxy gives itself.

An `Ending` says how an end is counted and logged and, where the answer is ours, what the client gets. A `ProxyError`
is an ending that happened, with the numbers that belong to it. This module knows nothing of HTTP servers, of
scheduling or of metrics: they all read this table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Final

import msgspec

_TYPE_OF_STATUS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
}
"""The `type` that goes with a status, where it is not the code itself."""

Headers = list[tuple[bytes, bytes]]


class Status(StrEnum):
    """How a scheduled request ended: the label `status` of `openai_proxy_requests_total`."""

    COMPLETED = auto()
    EVICTED = auto()
    REJECTED = auto()
    TIMEOUT = auto()
    FAILED = auto()
    CANCELLED = auto()


class Outcome(StrEnum):
    """Who or what decided the end: the label `outcome` of `openai_proxy_requests_outcome_total`."""

    SUCCESS = auto()
    EVICTED = auto()
    REJECTED = auto()
    TIMEOUT = auto()
    UPSTREAM_ERROR = auto()
    PROXY_ERROR = auto()
    CANCELLED = auto()


class Retry(Enum):
    """What a refusal tells the client about coming back."""

    UNSAID = auto()
    NEVER = auto()
    SOON = auto()
    MEASURED = auto()


@dataclass(frozen=True, slots=True)
class Ending:
    """One way in which a request can end.

    `code` names it, in logs and in the error's body. `http_status` is None where no answer of ours is given.
    `status` and `outcome` are None for refusals before scheduling, which are not counted as requests. `message` is
    a template for the error's text; its fields are given to `ProxyError`.
    """

    code: str
    http_status: int | None = None
    status: Status | None = None
    outcome: Outcome | None = None
    retry: Retry = Retry.UNSAID
    message: str = ""

    @property
    def type(self) -> str:
        """The `type` of the error object, as OpenAI's SDKs expect it."""
        return _TYPE_OF_STATUS.get(self.http_status or 0, self.code)


COMPLETED = Ending("completed", status=Status.COMPLETED, outcome=Outcome.SUCCESS)
"""The upstream's whole answer, with a status below 500 and not 429."""

UPSTREAM_REFUSED = Ending("upstream_refused", status=Status.FAILED, outcome=Outcome.UPSTREAM_ERROR)
"""The upstream's whole answer, with 429 or a status from 500 on."""

UPSTREAM_BROKE_OFF = Ending(
    "upstream_broke_off",
    status=Status.FAILED,
    outcome=Outcome.UPSTREAM_ERROR,
    message="the upstream broke off in the middle of its answer: {reason}",
)

CANCELLED = Ending("cancelled", status=Status.CANCELLED, outcome=Outcome.CANCELLED)
"""The client went away, stopped reading, or was cut off at the end of the shutdown grace."""

INVALID_PRIORITY = Ending(
    "invalid_priority",
    400,
    message="{where} is {value}, which is not a priority: use {accepted}.",
)
INVALID_REQUEST = Ending("invalid_request", 400, message="{reason}")
INVALID_API_KEY = Ending(
    "invalid_api_key",
    401,
    message="{reason} Send a key that this proxy knows, as 'Authorization: Bearer KEY'.",
)
MODEL_NOT_ALLOWED = Ending(
    "model_not_allowed",
    403,
    message="The key {key!r} must not be used for {model}, only for: {allowed}.",
)
PRIORITY_NOT_ALLOWED = Ending(
    "priority_not_allowed",
    403,
    message="The key {key!r} must not ask for a priority of {priority}: {highest} is the highest that it may have.",
)
NOT_FOUND = Ending(
    "not_found",
    404,
    message="There is nothing to {method} at {path}: the API is under /v1/; /health, /ready and /metrics answer GET.",
)
REQUEST_TOO_LARGE = Ending(
    "request_too_large",
    413,
    message="The request's body is larger than {limit} bytes, the most that this proxy takes (server.max_body_size).",
)
INTERNAL_ERROR = Ending(
    "internal_error",
    500,
    Status.FAILED,
    Outcome.PROXY_ERROR,
    Retry.NEVER,
    "The proxy failed while it handled this request. The reason is in its log under request id {request_id}.",
)
UPSTREAM_UNREACHABLE = Ending(
    "upstream_unreachable",
    502,
    Status.FAILED,
    Outcome.UPSTREAM_ERROR,
    Retry.SOON,
    "The proxy could not connect to its upstream {upstream}: {reason}",
)
UPSTREAM_PROTOCOL_ERROR = Ending(
    "upstream_protocol_error",
    502,
    Status.FAILED,
    Outcome.UPSTREAM_ERROR,
    Retry.SOON,
    "The upstream {upstream} did not give a usable HTTP answer: {reason}",
)
QUEUE_FULL = Ending(
    "queue_full",
    503,
    Status.REJECTED,
    Outcome.REJECTED,
    Retry.MEASURED,
    "All {permits} slots are busy and the queue is full ({queued} of {max_queue} places taken, none by a request of "
    "lower priority than {priority}). Try again in about {retry_after} s{or_with_a_higher_priority}.",
)
RATE_LIMIT_EXCEEDED = Ending(
    "rate_limit_exceeded",
    429,
    Status.REJECTED,
    Outcome.REJECTED,
    Retry.MEASURED,
    "The key {key!r} has as many requests here as it may: {running} run (of {key_permits}) and {waiting} wait (of "
    "{key_places}), none of these with a lower priority than {priority}. Try again in about {retry_after} s.",
)
SHUTTING_DOWN = Ending(
    "shutting_down",
    503,
    Status.REJECTED,
    Outcome.REJECTED,
    Retry.MEASURED,
    "The proxy is shutting down and takes no new requests. Try again in about {retry_after} s.",
)
TOO_MANY_WEBSOCKETS = Ending(
    "too_many_websockets",
    503,
    Status.REJECTED,
    Outcome.REJECTED,
    Retry.MEASURED,
    "All {limit} WebSocket connections that this proxy takes at once are in use (server.max_websockets). Try again in "
    "about {retry_after} s.",
)
EVICTED = Ending(
    "evicted",
    503,
    Status.EVICTED,
    Outcome.EVICTED,
    Retry.MEASURED,
    "{queue} was full ({max_queue} places) and a more urgent request took this one's place after {waited:.3f} s of "
    "waiting with priority {priority}. Try again in about {retry_after} s{or_with_a_higher_priority}.",
)
QUEUE_TIMEOUT = Ending(
    "queue_timeout",
    504,
    Status.TIMEOUT,
    Outcome.TIMEOUT,
    Retry.NEVER,
    "No slot came free within {limit:g} s (scheduler.queue_timeout) for this request of priority {priority}; nothing "
    "was sent upstream.",
)
DEADLINE_EXCEEDED = Ending(
    "deadline_exceeded",
    504,
    Status.TIMEOUT,
    Outcome.TIMEOUT,
    Retry.NEVER,
    "The request's own deadline (X-Request-Timeout) of {limit:g} s has passed.",
)
UPSTREAM_TIMEOUT = Ending(
    "upstream_timeout",
    504,
    Status.TIMEOUT,
    Outcome.TIMEOUT,
    Retry.NEVER,
    "The upstream did not answer within {limit:g} s ({setting}).",
)

ENDINGS: Final = (
    COMPLETED,
    UPSTREAM_REFUSED,
    UPSTREAM_BROKE_OFF,
    CANCELLED,
    INVALID_PRIORITY,
    INVALID_REQUEST,
    INVALID_API_KEY,
    MODEL_NOT_ALLOWED,
    PRIORITY_NOT_ALLOWED,
    NOT_FOUND,
    REQUEST_TOO_LARGE,
    INTERNAL_ERROR,
    UPSTREAM_UNREACHABLE,
    UPSTREAM_PROTOCOL_ERROR,
    QUEUE_FULL,
    RATE_LIMIT_EXCEEDED,
    SHUTTING_DOWN,
    TOO_MANY_WEBSOCKETS,
    EVICTED,
    QUEUE_TIMEOUT,
    DEADLINE_EXCEEDED,
    UPSTREAM_TIMEOUT,
)
"""The whole table."""


def of_upstream_status(http_status: int) -> Ending:
    """How a whole answer of the upstream counts."""
    return UPSTREAM_REFUSED if http_status >= 500 or http_status == 429 else COMPLETED


RETRY_SECONDS_MIN: Final = 1.0
RETRY_SECONDS_MAX: Final = 60.0
"""openai-node ignores a longer time and comes back at once."""

RETRY_SPREAD: Final = 0.25
"""`retry-after-ms` lies within this share of `retry-after`, so that the refused do not come back in one herd."""


class ProxyError(Exception):
    """An ending that happened.

    `queue_seconds` is the time spent waiting for a slot (None: never asked for one). `retry_after` is how long to
    stay away, in seconds, for endings whose `retry` is MEASURED. `close`: the connection cannot be used any more, since
    what was sent on it can be read in two ways. The other facts fill the message's template.
    """

    def __init__(
        self,
        ending: Ending,
        *,
        param: str | None = None,
        queue_seconds: float | None = None,
        close: bool = False,
        retry_after: float = RETRY_SECONDS_MIN,
        **facts: object,
    ) -> None:
        self.ending = ending
        self.param = param
        self.queue_seconds = queue_seconds
        self.close = close
        self.retry_after = min(max(retry_after, RETRY_SECONDS_MIN), RETRY_SECONDS_MAX)
        super().__init__(ending.message.format(retry_after=math.ceil(self.retry_after), **facts))


_QUOTED_BYTES: Final = re.compile(r""":?\s*\b(?:bytearray\()?b['"].*""", re.DOTALL)


def without_quotes(message: str) -> str:
    """A parser's message, but for what it quotes, as Python writes bytes: that may be a key, or a piece of a body."""
    return _QUOTED_BYTES.sub("", message)


def body(error: ProxyError) -> bytes:
    """The error as OpenAI's API writes it.

    https://platform.openai.com/docs/guides/error-codes
    """
    ending = error.ending
    return msgspec.json.encode(
        {"error": {"message": str(error), "type": ending.type, "param": error.param, "code": ending.code}}
    )


def retry_headers(error: ProxyError, spread: float) -> Iterable[tuple[bytes, bytes]]:
    """The headers by which OpenAI's SDKs decide whether and when to come back.

    `spread` is a random number from 0 to 1. The SDKs obey `x-should-retry`, then `retry-after-ms`, then `retry-after`.
    """
    match error.ending.retry:
        case Retry.UNSAID:
            return
        case Retry.NEVER:
            yield b"x-should-retry", b"false"
            return
        case Retry.SOON:
            seconds = RETRY_SECONDS_MIN
        case Retry.MEASURED:
            seconds = error.retry_after
    factor = 1 + RETRY_SPREAD * (2 * spread - 1)
    milliseconds = 1000 * min(seconds, RETRY_SECONDS_MAX / (1 + RETRY_SPREAD)) * factor
    yield b"retry-after", b"%d" % math.ceil(seconds)
    yield b"retry-after-ms", b"%d" % milliseconds
    yield b"x-should-retry", b"true"
