"""HTTP/1.1 as its server speaks it, as far as plain requests go: llhttp reads them, answers are written here. Pure.

A request is plain if nothing about it is out of the ordinary: a common method, no body or one of known length, a
connection that is kept, no other protocol asked for, nothing that llhttp (httptools) refuses in its strict mode. As
soon as one is not, h11 takes over for the rest of the connection: it knows of everything else. What is done here is
what h11 would do, at a tenth of the cost; the tests hold both against each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Final

import h11
import httptools
from h11._util import Sentinel

from trioproxy.http1 import LAST_CHUNK, Headers, chunk

_METHODS: Final = frozenset({b"DELETE", b"GET", b"OPTIONS", b"PATCH", b"POST", b"PUT"})
_ODD_FIELDS: Final = frozenset(
    {
        b"expect",
        b"http2-settings",
        b"sec-websocket-extensions",
        b"sec-websocket-protocol",
        b"transfer-encoding",
        b"upgrade",
    }
)
_BODILESS: Final = frozenset({204, 304})
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_HEAD_END: Final = re.compile(rb"\n\r?\n")
_TARGET: Final = re.compile(rb"[!-~]+")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_REASONS: Final = {int(status): status.phrase.encode("ascii") for status in HTTPStatus}


def reason_phrase(status: int) -> bytes:
    """The reason phrase of a status (RFC 9112 section 4): some clients take an answer without one for none."""
    return _REASONS.get(status, b"")


class Mark(Enum):
    """What the bytes of a connection mean beside requests and pieces of bodies."""

    NEED_DATA = auto()
    """Nothing yet."""
    END = auto()
    """The request's body is complete."""
    PAUSED = auto()
    """Another request has come before this one was answered."""
    CLOSED = auto()
    """The client has closed its side."""
    ODD = auto()
    """A request that is not plain: what `rest` returns is for h11."""


@dataclass(frozen=True, slots=True)
class PlainRequest:
    """A request's head."""

    method: bytes
    target: bytes
    """As it was sent."""
    headers: Headers
    """As they were sent, names in their own letter case."""
    body_size: int


class _Collector:
    """What llhttp is told to do with a head."""

    __slots__ = ("headers", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: Headers = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value.rstrip(b" \t")))


def read_plain(head: bytes) -> PlainRequest | None:
    """Read a head, which `head` is all of; None if it is not a plain one."""
    collector = _Collector()
    parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(head)
        method, version = parser.get_method(), parser.get_http_version()
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    if version != "1.1" or method not in _METHODS or not _TARGET.fullmatch(collector.target):
        return None
    if not head.startswith(b"%b %b HTTP/1.1\r\n" % (method, collector.target)):
        return None
    size = _body_size(collector.headers)
    return None if size is None else PlainRequest(method, collector.target, collector.headers, size)


def _body_size(headers: Headers) -> int | None:
    """How long a request's body is (RFC 9112 section 6.3); None if its fields are not those of a plain request."""
    size: int | None = None
    hosts = 0
    for field, value in headers:
        name = field.lower()
        if name == b"content-length":
            if size is not None or not _LENGTH.fullmatch(value):
                return None
            size = int(value)
        elif name == b"host":
            hosts += 1
        elif name in _ODD_FIELDS or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
    return None if hosts != 1 else size or 0


def _said(headers: Headers) -> tuple[int | None, bool]:
    """What an answer's fields say: how long its body is, None if that is not known; whether it is the last one."""
    size: int | None = None
    in_chunks = is_last = False
    for field, value in headers:
        name = field.lower()
        if name == b"content-length":
            size = int(value)
        elif name == b"transfer-encoding":
            in_chunks = True
        elif name == b"connection":
            is_last = is_last or b"close" in [token.strip() for token in value.lower().split(b",")]
    return None if in_chunks else size, is_last


class PlainConnection:
    """One connection, as long as its requests are plain. States are h11's, and so are errors."""

    __slots__ = (
        "_buffer",
        "_closing",
        "_ended",
        "_head_size_max",
        "_left",
        "_searched",
        "_to_send",
        "our_state",
        "their_state",
    )

    they_are_waiting_for_100_continue: Final = False

    def __init__(self, head_size_max: int) -> None:
        self.our_state: type[Sentinel] = h11.IDLE
        self.their_state: type[Sentinel] = h11.IDLE
        self._head_size_max = head_size_max
        self._buffer = b""
        self._searched = 0
        """How much of the buffer has been searched for the head's end."""
        self._ended = False
        self._closing = False
        """The answer says that it is the last one."""
        self._left = 0
        """Bytes of the request's body that are to come."""
        self._to_send: int | None = 0
        """Bytes of the answer's body that are to be sent; None if it is in chunks."""

    def receive_data(self, data: bytes) -> None:
        """Take in what has come; b"" is the end. Behind the last request nothing matters (RFC 9112 section 9.6)."""
        if self.their_state is h11.MUST_CLOSE:
            return
        self._buffer = self._buffer + data if self._buffer else data
        self._ended = self._ended or not data

    def rest(self) -> tuple[bytes, bool]:
        """What has not been read, and whether that is all that will come."""
        return self._buffer, self._ended

    def next_event(self) -> PlainRequest | bytes | Mark:
        """What has come: a request, a piece of its body, or a mark. Raises h11's `RemoteProtocolError`."""
        if self.their_state is h11.IDLE:
            return self._next_request()
        if self.their_state is h11.SEND_BODY:
            return self._next_piece()
        if self.their_state is h11.DONE and self._buffer:
            return Mark.PAUSED
        if self._ended and self.their_state is not h11.MUST_CLOSE:
            return Mark.CLOSED
        return Mark.NEED_DATA

    def _next_request(self) -> PlainRequest | Mark:
        buffer = self._buffer
        if not buffer:
            return Mark.CLOSED if self._ended else Mark.NEED_DATA
        end = _HEAD_END.search(buffer, max(0, self._searched - 2))
        if end is None:
            self._searched = len(buffer)
            is_odd = self._ended or len(buffer) > self._head_size_max or not b"A" <= buffer[:1] <= b"Z"
            return Mark.ODD if is_odd else Mark.NEED_DATA
        request = read_plain(buffer[: end.end()])
        if request is None:
            return Mark.ODD
        self._buffer = buffer[end.end() :]
        self._left = request.body_size
        self.their_state, self.our_state = h11.SEND_BODY, h11.SEND_RESPONSE
        return request

    def _next_piece(self) -> bytes | Mark:
        if not self._left:
            self.their_state = h11.MUST_CLOSE if self._closing else h11.DONE
            return Mark.END
        if not self._buffer:
            if self._ended:
                self.their_state = h11.ERROR
                raise h11.RemoteProtocolError(
                    f"peer closed connection without sending complete message body ({self._left} bytes are missing)"
                )
            return Mark.NEED_DATA
        piece, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(piece)
        return piece

    def head(self, status: int, headers: Headers) -> bytes:
        """The head of the answer. What follows is as long as `headers` say; in chunks if they do not."""
        self._expect(h11.SEND_RESPONSE)
        size, self._closing = _said(headers)
        self._to_send = 0 if status in _BODILESS else size
        if self._to_send is None:
            headers = [field for field in headers if field[0].lower() not in _FRAMING]
            headers.append((b"Transfer-Encoding", b"chunked"))
        self.our_state = h11.SEND_BODY
        if self._closing and self.their_state is h11.DONE:
            self.their_state = h11.MUST_CLOSE
        return b"HTTP/1.1 %d %b\r\n%b\r\n" % (
            status,
            reason_phrase(status),
            b"".join([b"%b: %b\r\n" % field for field in headers]),
        )

    def data(self, piece: bytes) -> bytes:
        """A piece of the answer's body."""
        self._expect(h11.SEND_BODY)
        if self._to_send is None:
            return chunk(piece) if piece else b""
        self._to_send -= len(piece)
        if self._to_send < 0:
            raise self._failed("Too much data for declared Content-Length")
        return piece

    def end(self) -> bytes:
        """The end of the answer."""
        self._expect(h11.SEND_BODY)
        if self._to_send:
            raise self._failed("Too little data for declared Content-Length")
        self.our_state = h11.MUST_CLOSE if self._closing else h11.DONE
        return LAST_CHUNK if self._to_send is None else b""

    def start_next_cycle(self) -> None:
        """Get ready for the next request. Raises h11's `LocalProtocolError` if the last one is not over."""
        if self.our_state is not h11.DONE or self.their_state is not h11.DONE:
            raise h11.LocalProtocolError("not in a reusable state")
        self.our_state = self.their_state = h11.IDLE
        self._searched = 0

    def _expect(self, state: type[Sentinel]) -> None:
        if self.our_state is not state:
            raise self._failed(f"can't send this in state {self.our_state}")

    def _failed(self, reason: str) -> h11.LocalProtocolError:
        self.our_state = h11.ERROR
        return h11.LocalProtocolError(reason)
