"""HTTP in → what the scheduler and the upstream need: route, priority, deadline, clean headers. Pure.

Knows nothing of trio, of Quart or of who sends the bytes: it reads an ASGI scope's plain values and says what they
mean, or raises `ProxyError`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, NotRequired, TypedDict
from urllib.parse import unquote_to_bytes

from werkzeug.http import parse_options_header

from trioproxy import body, errors, priority
from trioproxy.config import KeySettings, SchedulerSettings
from trioproxy.errors import (
    INVALID_API_KEY,
    INVALID_PRIORITY,
    INVALID_REQUEST,
    NOT_FOUND,
    PRIORITY_NOT_ALLOWED,
    Headers,
    ProxyError,
)

PREFIX: Final = b"/v1"

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Fields that concern one connection only (RFC 9110 section 7.6.1) and those that are for a proxy."""

OURS: Final = frozenset({b"x-priority", b"x-request-timeout"})
"""Request fields that are for us."""

_SET_ANEW: Final = frozenset({b"content-length", b"expect", b"host"})
"""Request fields that say something of the connection to us, and are set anew, if at all, for the one upstream."""

_CREDENTIALS: Final = frozenset({b"authorization", b"openai-organization", b"openai-project"})

OTHER_CREDENTIALS: Final = frozenset({b"api-key", b"x-api-key"})
"""Where some clients put a key instead of into `Authorization`."""

_NOT_SENT: Final = HOP_BY_HOP | OURS | _SET_ANEW
_NOT_SENT_WITH_OURS: Final = _NOT_SENT | _CREDENTIALS
_NOT_SENT_WITH_KEY: Final = _NOT_SENT_WITH_OURS | OTHER_CREDENTIALS
"""Request fields that are not sent on: with the client's own credentials, with ours, with ours in place of a client key
that may be anywhere."""

_NOT_PASSED_ON: Final = HOP_BY_HOP | {b"x-trioproxy-request-id"}
"""Fields of an answer that are not passed on."""

KEY_SUBPROTOCOL: Final = "openai-insecure-api-key."
"""What stands before the key in the WebSocket subprotocol by which browsers send it."""

_CREDENTIALS_IN_SUBPROTOCOLS: Final = (KEY_SUBPROTOCOL, "openai-organization.", "openai-project.")

SERVICE_TIERS: Final = {"flex": priority.BY_NAME["low"], "priority": priority.BY_NAME["high"]}
"""The values of a body's `service_tier` that are a priority, where `scheduler.honor_service_tier` says so.

https://platform.openai.com/docs/api-reference/chat/create#chat_create-service_tier
"""

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_SECONDS: Final = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,9})?")
_DEADLINE_MIN: Final = 0.001
_DEADLINE_MAX: Final = 86_400.0
_TARGET: Final = re.compile(rb"[!-~]+")
_NAME: Final = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")
_HOST: Final = re.compile(
    rb"(\[[-0-9A-Za-z._~!$&'()*+,;=:%]+\]|([-0-9A-Za-z._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(:[0-9]*)?"
)
_LENGTH_MAX: Final = (1 << 63) - 1
_FORM: Final = re.compile(r'multipart/form-data(?:[ \t]*;[ \t]*[a-z-]+=(?:"[^"\\]*"|[^\s";,=]+))*;?', re.IGNORECASE)
_BOUNDARY: Final = re.compile(r";[ \t]*boundary=", re.IGNORECASE)
"""A greater Content-Length is nobody's, and becomes a small one in a server that counts in 64 bits."""
_VERSIONS: Final = frozenset({"1.0", "1.1", "2"})


class Scope(TypedDict):
    """The part of an ASGI HTTP scope that is read here.

    https://asgi.readthedocs.io/en/latest/specs/www.html#http-connection-scope
    """

    method: str
    http_version: str
    raw_path: bytes
    query_string: bytes
    headers: Iterable[tuple[bytes, bytes]]
    state: NotRequired[Mapping[str, object]]
    """May have the method in its own letter case, which ASGI changes, under `METHOD`."""


METHOD: Final = "trioproxy.method"
"""The key in a scope's `state` under which the server puts the method as it was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A request's head, read once."""

    method: str
    http_version: str
    path: bytes
    """As it was sent, without the query; an absolute-form target's path alone."""
    query: bytes
    headers: Headers
    """As they were sent, names in their own letter case."""
    request_id: str
    content_length: int | None
    chunked: bool
    """Whether a body of unknown length follows."""
    ours: Headers
    """The fields that are for us, with names in lower case."""

    @property
    def rest(self) -> bytes:
        """The path behind `/v1`, with its leading slash."""
        return self.path[len(PREFIX) :]

    @property
    def target(self) -> bytes:
        """The path behind `/v1` and the query, as they were sent."""
        return self.rest + b"?" + self.query if self.query else self.rest

    def values(self, name: bytes) -> list[bytes]:
        """The values of every field of that (lower-case) name."""
        return [value for key, value in self.headers if key.lower() == name]


def path_of(raw_path: bytes) -> bytes:
    """The path of a request target in origin-form or absolute-form (RFC 9112 section 3.2)."""
    if raw_path.startswith(b"/"):
        return raw_path
    _, separator, rest = raw_path.partition(b"://")
    return b"/" + rest.partition(b"/")[2] if separator else raw_path


def read_head(scope: Scope) -> Head:
    """Read a request's head. Never raises: `check` says what is wrong with it, once there is an id to say it to."""
    headers = list(scope["headers"])
    length: int | None = None
    chunked = False
    request_id = b""
    ours: Headers = []
    for name, value in headers:
        match name.lower():
            case b"content-length" if value.isdigit():
                length = int(value)
            case b"transfer-encoding":
                chunked = True
            case b"x-request-id" if _REQUEST_ID.fullmatch(value):
                request_id = value
            case lower if lower in OURS:
                ours.append((lower, value))
            case _:
                pass
    return Head(
        method=str(scope.get("state", {}).get(METHOD, scope["method"])),
        http_version=scope["http_version"],
        path=path_of(scope["raw_path"]),
        query=scope["query_string"],
        headers=headers,
        request_id=request_id.decode() if request_id else new_request_id(),
        content_length=length,
        chunked=chunked,
        ours=ours,
    )


def new_request_id() -> str:
    """An id that no other request has."""
    return f"req_{random.getrandbits(128):032x}"


def check(head: Head) -> None:
    """Refuse what must not be forwarded, whatever it asks for: raises `ProxyError`."""
    if head.http_version not in _VERSIONS:
        reason = f"HTTP/{head.http_version} is not spoken here: use 1.0, 1.1 or 2."
        raise ProxyError(INVALID_REQUEST, close=True, reason=reason)
    if head.chunked and head.http_version == "1.0":
        # RFC 9112 section 6.1: whoever sent it on may have read it in another way.
        raise ProxyError(
            INVALID_REQUEST, close=True, reason="HTTP/1.0 has no Transfer-Encoding: send a Content-Length."
        )
    if head.chunked and head.content_length is not None:
        # RFC 9112 section 6.3: the mark of request smuggling.
        reason = "Content-Length and Transfer-Encoding were sent together: send one."
        raise ProxyError(INVALID_REQUEST, close=True, reason=reason)
    if head.content_length is not None and head.content_length > _LENGTH_MAX:
        reason = f"Content-Length is {head.content_length}: at most {_LENGTH_MAX} can be sent."
        raise ProxyError(INVALID_REQUEST, close=True, reason=reason)
    if head.method == "CONNECT":
        raise ProxyError(INVALID_REQUEST, reason="CONNECT is not served: this is no forward proxy.")
    if head.path != PREFIX and not head.path.startswith(PREFIX + b"/"):
        raise ProxyError(NOT_FOUND, method=head.method, path=head.path.decode("latin-1"))
    _check_characters(head)
    decoded = unquote_to_bytes(head.path).replace(b"\\", b"/")
    if any(segment in (b".", b"..") for segment in decoded.split(b"/")):
        raise ProxyError(INVALID_REQUEST, reason="The path has dot segments ('.' or '..'): send it without them.")


def _check_characters(head: Head) -> None:
    """HTTP/1.1's parser has checked the method and names, HTTP/2's neither: a blank would make two words of it.

    A fragment is for the client alone (RFC 9110 4.2.5). `Host` goes nowhere, but must be one (RFC 9112 3.2).
    """
    if not _NAME.fullmatch(head.method.encode("latin-1", "replace")):
        raise ProxyError(INVALID_REQUEST, reason="The method has characters that are not allowed.")
    if not all(_HOST.fullmatch(value) for value in head.values(b"host")):
        raise ProxyError(INVALID_REQUEST, reason="The header field Host is not a host and a port.")
    if b"#" in head.target or not _TARGET.fullmatch(head.target or b"/"):
        raise ProxyError(INVALID_REQUEST, reason="The path has characters that must be percent-encoded, such as '#'.")
    if head.http_version != "2" and _VALUE.fullmatch(b" ".join([value for _, value in head.headers])):
        return
    for name, value in head.headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            shown = name.decode("latin-1")[:50]
            raise ProxyError(INVALID_REQUEST, reason=f"The header field {shown!r} has characters that are not allowed.")


def read_header_priority(head: Head) -> int | None:
    """The priority by header, None without one. Raises `ProxyError` for one that means nothing."""
    by_header = {_header_priority(value) for name, value in head.ours if name == b"x-priority"}
    if len(by_header) > 1:
        raise _invalid_priority("The header X-Priority", "given more than once with different values", "X-Priority")
    return next(iter(by_header), None)


def read_priority(head: Head, fields: body.Reading, key: KeySettings | None, settings: SchedulerSettings) -> int:
    """The priority: the first that is there of header, body, service tier, client key, model, and the default.

    What the client says itself (header, body) must not be above the key's highest, unless the key lowers it; all else
    is lowered to that. Raises `ProxyError`: INVALID_PRIORITY, PRIORITY_NOT_ALLOWED.
    """
    by_header = read_header_priority(head)
    by_body = {_body_priority(text) for text in fields.priorities}
    if len(by_body) > 1:
        raise _invalid_priority("The field priority", "given more than once with different values", "priority")
    said = by_header if by_header is not None else next(iter(by_body), None)
    if said is not None:
        return allowed_priority(said, key)
    derived = _derived_priority(fields, key, settings)
    return derived if key is None else min(derived, key.max_priority)


def allowed_priority(said: int, key: KeySettings | None) -> int:
    """The priority that a client said, lowered if its key says so. Raises `ProxyError`: PRIORITY_NOT_ALLOWED."""
    if key is None or said <= key.max_priority:
        return said
    if not key.clamp:
        raise ProxyError(PRIORITY_NOT_ALLOWED, param="priority", key=key.name, priority=said, highest=key.max_priority)
    return key.max_priority


def _derived_priority(fields: body.Reading, key: KeySettings | None, settings: SchedulerSettings) -> int:
    if settings.honor_service_tier and fields.service_tier in SERVICE_TIERS:
        return SERVICE_TIERS[fields.service_tier]
    if key is not None and key.default_priority is not None:
        return key.default_priority
    if fields.model is not None:
        for glob, of_model in settings.model_priorities.items():
            if fnmatchcase(fields.model, glob):
                return of_model
    return settings.default_priority


def form_boundary(head: Head) -> bytes | None:
    """What separates the parts of a form (RFC 2046 section 5.1.1).

    None if the body is not said to be one, or not in a way that all readers take for the same.
    """
    said = [value.decode("latin-1") for value in head.values(b"content-type")]
    if len(said) != 1 or _FORM.fullmatch(said[0]) is None or len(_BOUNDARY.findall(said[0])) != 1:
        return None
    _, options = parse_options_header(said[0])
    return options.get("boundary", "").encode("latin-1", "replace") or None


def _header_priority(value: bytes) -> int:
    text = value.decode("latin-1")
    if (number := priority.parse(text)) is None:
        raise _invalid_priority("The header X-Priority", repr(text[:50]), "X-Priority")
    return number


def _body_priority(json_text: str) -> int:
    text = json.loads(json_text) if json_text.startswith('"') else json_text
    if (number := priority.parse(text)) is None:
        raise _invalid_priority("The body's field priority", json_text[:50], "priority")
    return number


def _invalid_priority(where: str, value: str, param: str) -> ProxyError:
    return ProxyError(INVALID_PRIORITY, param=param, where=where, value=value, accepted=priority.ACCEPTED)


def read_timeout(head: Head) -> float | None:
    """The seconds of `X-Request-Timeout`, None without one. Raises `ProxyError` for an unusable one."""
    values = [value for name, value in head.ours if name == b"x-request-timeout"]
    if not values:
        return None
    seconds = {float(value) if _SECONDS.fullmatch(value.strip()) else 0.0 for value in values}
    if len(seconds) > 1 or not _DEADLINE_MIN <= min(seconds) <= _DEADLINE_MAX:
        said = ", ".join(value.decode("latin-1")[:50] for value in values)
        raise ProxyError(
            INVALID_REQUEST,
            param="X-Request-Timeout",
            reason=f"The header X-Request-Timeout is {said!r}: use one number of seconds from {_DEADLINE_MIN} "
            f"to {_DEADLINE_MAX:.0f}.",
        )
    return min(seconds)


def _end_to_end(headers: Headers, dropped: frozenset[bytes]) -> tuple[Headers, set[bytes]]:
    """The fields that go on, repeated ones and their order kept; and the names, in lower case, that there were at all.

    `dropped` are the names, in lower case, of those that do not, whatever `Connection` says; what it names does not
    either, and counts as not there.
    """
    kept: Headers = []
    names: set[bytes] = set()
    named: set[bytes] = set()
    for field in headers:
        name = field[0].lower()
        names.add(name)
        if name not in dropped:
            kept.append(field)
        elif name == b"connection":
            named.update(token.strip() for token in field[1].lower().split(b","))
    if named:
        kept = [field for field in kept if field[0].lower() not in named]
        names -= named - HOP_BY_HOP
    return kept, names


def upstream_headers(
    head: Head, *, host: bytes, authorization: bytes | None, body_size: int | None, has_key: bool = False
) -> Headers:
    """The fields to send upstream.

    `authorization` replaces the client's credentials unless it is None; `has_key`: a client key of ours is among them,
    wherever clients put it. `body_size` is the body's length in bytes;
    None means that a body of unknown length follows (chunked) if `head.chunked`, else that there is none.
    """
    replaced = _NOT_SENT_WITH_KEY if has_key else _NOT_SENT_WITH_OURS
    dropped = _NOT_SENT if authorization is None else replaced
    headers = [(b"Host", host), *_end_to_end(head.headers, dropped)[0]]
    if authorization is not None:
        headers.append((b"Authorization", authorization))
    if body_size is not None:
        headers.append((b"Content-Length", b"%d" % body_size))
    elif head.chunked:
        headers.append((b"Transfer-Encoding", b"chunked"))
    return headers


def identification(request_id: str, queue_seconds: float | None) -> Headers:
    """The fields that every answer has from us.

    `queue_seconds` becomes a W3C Server-Timing entry in milliseconds; None where nothing was scheduled.
    """
    headers = [(b"x-trioproxy-request-id", request_id.encode())]
    if queue_seconds is not None:
        headers.append((b"server-timing", b"queue;dur=%.3f" % (1000 * queue_seconds)))
    return headers


def _is_wrong_length(field: tuple[bytes, bytes], status: int) -> bool:
    """Whether a field is a length beside chunks (RFC 9112 section 6.3), or one that a 204 says (RFC 9110 section 8.6).

    HTTP/2 clients refuse a 204 that has one, but for 0.
    """
    name, value = field
    return name.lower() == b"content-length" and not (status == 204 and value.strip(b" 0") == b"")


def client_headers(status: int, upstream: Headers, request_id: str, queue_seconds: float | None) -> Headers:
    """The fields of the upstream's answer as they go on to the client, and ours."""
    headers, names = _end_to_end(upstream, _NOT_PASSED_ON)
    if b"content-length" in names and (b"transfer-encoding" in names or status == 204):
        headers = [field for field in headers if not _is_wrong_length(field, status)]
    if b"x-request-id" not in names:
        headers.append((b"x-request-id", request_id.encode()))
    return headers + identification(request_id, queue_seconds)


def websocket_headers(
    head: Head,
    *,
    host: bytes,
    authorization: bytes | None,
    key: bytes,
    subprotocols: Iterable[str],
    has_key: bool = False,
) -> Headers:
    """The fields of a WebSocket handshake to send upstream (RFC 6455 section 4.1), the client's own among them.

    Extensions are each connection's own, and none are offered.
    """
    dropped = frozenset(name.lower() for name, _ in head.headers if _is_of_websocket(name))
    headers = upstream_headers(head, host=host, authorization=authorization, body_size=None, has_key=has_key)
    headers = [(name, value) for name, value in headers if name.lower() not in dropped | {b"transfer-encoding"}]
    headers += [
        (b"Connection", b"Upgrade"),
        (b"Upgrade", b"websocket"),
        (b"Sec-WebSocket-Key", key),
        (b"Sec-WebSocket-Version", b"13"),
    ]
    if offered := ", ".join(subprotocols).encode("latin-1"):
        headers.append((b"Sec-WebSocket-Protocol", offered))
    return headers


def without_credentials(subprotocols: Iterable[str]) -> list[str]:
    """The subprotocols that are not a browser's way to say `Authorization`, `OpenAI-Organization`, `OpenAI-Project`."""
    return [name for name in subprotocols if not name.startswith(_CREDENTIALS_IN_SUBPROTOCOLS)]


def accepted_headers(upstream: Headers, request_id: str) -> Headers:
    """The fields of the upstream's answer 101 as they go on to the client, and ours."""
    headers = client_headers(101, upstream, request_id, None)
    return [
        (name, value) for name, value in headers if not _is_of_websocket(name) and name.lower() != b"content-length"
    ]


def _is_of_websocket(name: bytes) -> bool:
    return name.lower().startswith(b"sec-websocket-")


def refusal(error: ProxyError, request_id: str, spread: float) -> tuple[int, Headers, bytes]:
    """One of our own answers: status, headers, body. `spread` is a random number from 0 to 1."""
    assert error.ending.http_status is not None
    body = errors.body(error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
        *([(b"connection", b"close")] if error.close else []),
        *([(b"www-authenticate", b"Bearer")] if error.ending is INVALID_API_KEY else []),
        *errors.retry_headers(error, spread),
        *identification(request_id, error.queue_seconds),
    ]
    return error.ending.http_status, headers, body
