"""Requests, heads and events for tests, each with every value that a test does not care for filled in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

from trioproxy import request
from trioproxy.errors import Ending, ProxyError
from trioproxy.events import RequestFacts, ScheduledRequest

Fields = Iterable[tuple[str, str]]


def facts(**values: Any) -> RequestFacts:
    """A request that needs no slot, arrived at 0."""
    return replace(RequestFacts(request_id="req_1", method="GET", path="/v1/models", arrived=0.0), **values)


def scheduled(priority: int = 50, **values: Any) -> ScheduledRequest:
    """A request that needs a slot, arrived at 0."""
    plain = ScheduledRequest(
        request_id="req_1", method="POST", path="/v1/chat/completions", arrived=0.0, priority=priority
    )
    return replace(plain, **values)


def head(
    target: str | bytes = "/v1/chat/completions", headers: Fields = (), *, method: str = "POST", version: str = "1.1"
) -> request.Head:
    """A request's head as read from the ASGI scope that a server makes of this request line and these fields."""
    raw_path, _, query = (target.encode("latin-1") if isinstance(target, str) else target).partition(b"?")
    return request.read_head(
        {
            "method": method,
            "http_version": version,
            "raw_path": raw_path,
            "query_string": query,
            "headers": raw(headers),
        }
    )


def raw(fields: Fields) -> list[tuple[bytes, bytes]]:
    """Header fields as they are on the wire."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]


MESSAGE_FACTS: dict[str, dict[str, object]] = {
    "upstream_broke_off": {"reason": "it closed the connection"},
    "invalid_priority": {"where": "The header X-Priority", "value": "'urgent'", "accepted": "an integer"},
    "invalid_request": {"reason": "The path has dot segments."},
    "not_found": {"method": "GET", "path": "/v2/models"},
    "invalid_api_key": {"reason": "The request has no API key."},
    "model_not_allowed": {"key": "web", "model": "the model 'gpt-9'", "allowed": "gpt-5*"},
    "priority_not_allowed": {"key": "web", "priority": 91, "highest": 71},
    "request_too_large": {"limit": 67108864},
    "internal_error": {"request_id": "req_1234"},
    "upstream_unreachable": {"upstream": "https://api.example", "reason": "connection refused"},
    "upstream_protocol_error": {"upstream": "https://api.example", "reason": "no status line"},
    "queue_full": {
        "permits": 11,
        "queued": 97,
        "max_queue": 98,
        "priority": 42,
        "or_with_a_higher_priority": ", or with a higher priority",
    },
    "shutting_down": {},
    "too_many_websockets": {"limit": 96},
    "rate_limit_exceeded": {
        "key": "web",
        "running": 3,
        "key_permits": 4,
        "waiting": 5,
        "key_places": 6,
        "priority": 42,
    },
    "evicted": {
        "queue": "The queue",
        "max_queue": 98,
        "waited": 12.345,
        "priority": 42,
        "or_with_a_higher_priority": ", or with a higher priority",
    },
    "queue_timeout": {"limit": 299, "priority": 42},
    "deadline_exceeded": {"limit": 2.5},
    "upstream_timeout": {"limit": 600, "setting": "upstream.first_byte_timeout"},
}
"""What each ending's message tells, by the ending's code."""


def happened(
    ending: Ending,
    *,
    param: str | None = None,
    queue_seconds: float | None = None,
    retry_after: float = 1.0,
    **told: object,
) -> ProxyError:
    """An ending that happened, with facts for its message."""
    return ProxyError(
        ending,
        param=param,
        queue_seconds=queue_seconds,
        retry_after=retry_after,
        **cast(dict[str, Any], MESSAGE_FACTS.get(ending.code, {}) | told),
    )


def error_of(body: bytes) -> dict[str, object]:
    """The error object in the body of an answer of ours."""
    (error,) = json.loads(body).values()
    assert isinstance(error, dict)
    return error
