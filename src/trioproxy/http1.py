"""HTTP/1.1 as its client speaks it: a request's head into bytes, an answer's bytes into head and body. Pure.

Reading is llhttp's work (httptools), in its strict mode. A head that it refuses is read again by h11, which knows of
what servers are still forgiven: lines that end with LF alone, folded ones, equal lengths, both framings (RFC 9112
sections 2.2, 5.2, 6.3). The framing of a body is told from the head here, as RFC 9112 section 6.3 says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol

import h11
import httptools

Headers = list[tuple[bytes, bytes]]

HEAD_SIZE_MAX: Final = 100 * 1024
"""Bytes of an answer's head, and of what is in a chunked body beside the chunks' data, without any between."""

FIELDS_MAX: Final = 1000
"""Fields of one head."""

_HEAD_END: Final = re.compile(rb"\n\r?\n")
_BODILESS: Final = frozenset({204, 304})
_CHUNKED_HEAD: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class ProtocolError(Exception):
    """What came is not HTTP/1.1, or not all of it."""


class UnsendableError(Exception):
    """A request that would not arrive as it is meant: a field that is none, or a body of another length than said.

    Says not which field: it may be a key.
    """


def request_head(method: str, target: bytes, headers: Headers) -> bytes:
    """A request's head (RFC 9112 section 3). Raises `UnsendableError`."""
    lines = [b"%b %b HTTP/1.1\r\n" % (method.encode("ascii"), target)]
    lines += [b"%b: %b\r\n" % field for field in headers]
    lines.append(b"\r\n")
    head = b"".join(lines)
    ends = len(lines)
    if head.count(b"\r") != ends or head.count(b"\n") != ends or b"\0" in head:
        raise UnsendableError
    return head


def upload_size(headers: Headers) -> int | None:
    """How long the body of a request with these fields is; None if it is in chunks (RFC 9112 section 6.3)."""
    size = 0
    for name, value in headers:
        if len(name) == 17 and name.lower() == b"transfer-encoding":
            return None
        if len(name) == 14 and name.lower() == b"content-length":
            size = int(value)
    return size


LAST_CHUNK: Final = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk (RFC 9112 section 7.1) of data that is not empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(frozen=True, slots=True)
class Head:
    """An answer's head."""

    status: int
    headers: Headers
    """As they were sent, names in their own letter case."""
    version: str
    """`1.1` or what was said instead."""


class HeadReader:
    """Reads an answer's head, whatever pieces it comes in. Interim answers, 1xx but 101, are passed over."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> tuple[Head, bytes] | None:
        """Take in what has come: the head and what came behind it, once it is whole. Raises `ProtocolError`."""
        self._data += data
        searched = max(0, len(self._data) - len(data) - 2)
        while (end := _HEAD_END.search(self._data, searched)) is not None:
            head = read_head(bytes(self._data[: end.end()]))
            del self._data[: end.end()]
            if head.status >= 200 or head.status == 101:
                return head, bytes(self._data)
            searched = 0
        if not self._data.startswith(b"HTTP/"[: len(self._data)]):
            raise ProtocolError("it does not begin with HTTP/")
        if len(self._data) > HEAD_SIZE_MAX:
            raise ProtocolError(f"its head is larger than {HEAD_SIZE_MAX} bytes")
        return None

    def end(self) -> ProtocolError:
        """What it means that the connection has ended before the head did."""
        return ProtocolError("it closed the connection in its head" if self._data else "it closed the connection")


class _HeadCollector:
    """What llhttp is told to do with a head."""

    def __init__(self) -> None:
        self.headers: Headers = []
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


def read_head(data: bytes) -> Head:
    """Read a head, which `data` is all of. Raises `ProtocolError`."""
    if len(data) > HEAD_SIZE_MAX:
        raise ProtocolError(f"its head is larger than {HEAD_SIZE_MAX} bytes")
    collector = _HeadCollector()
    parser = httptools.HttpResponseParser(collector)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # to what, only who asked for it knows
    except httptools.HttpParserError as error:
        if not (collector.complete and parser.get_status_code() == 101):
            return _read_leniently(data, error)
    if not collector.complete:
        raise ProtocolError("its head begins with an empty line")
    head = Head(parser.get_status_code(), collector.headers, parser.get_http_version())
    if not 100 <= head.status <= 999:
        raise ProtocolError(f"its status is {head.status}")
    if len(head.headers) > FIELDS_MAX:
        raise ProtocolError(f"its head has more than {FIELDS_MAX} fields")
    return head


def _read_leniently(data: bytes, refusal: httptools.HttpParserError) -> Head:
    reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_SIZE_MAX)
    # It reads the answers to requests alone.
    asking = [("Host", "x"), ("Connection", "Upgrade"), ("Upgrade", "x")]
    reader.send(h11.Request(method="GET", target="/", headers=asking))
    reader.send(h11.EndOfMessage())
    reader.receive_data(data)
    try:
        event = reader.next_event()
    except h11.RemoteProtocolError:
        raise ProtocolError(f"its head cannot be read: {refusal}") from refusal
    if not isinstance(event, h11.Response | h11.InformationalResponse):
        raise ProtocolError(f"its head cannot be read: {refusal}") from refusal
    return Head(event.status_code, event.headers.raw_items(), event.http_version.decode())


class BodyReader(Protocol):
    """Reads a body, whatever pieces it comes in."""

    complete: bool
    """All of it has been read."""
    has_rest: bool
    """More has come than the body."""
    broken: ProtocolError | None
    """Why the body ends with what `feed` has returned so far."""

    def feed(self, data: bytes) -> bytes:
        """The part of the body that is in what has come."""
        ...

    def end(self) -> None:
        """The connection has ended. Raises `ProtocolError` if the body has not."""
        ...


class SizedBody:
    """A body of known length."""

    def __init__(self, size: int) -> None:
        self.complete = not size
        self.has_rest = False
        self.broken: ProtocolError | None = None
        self._left = size

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            self.has_rest = True
            data = data[: self._left]
        self._left -= len(data)
        self.complete = not self._left
        return data

    def end(self) -> None:
        raise ProtocolError(f"it closed the connection {self._left} bytes before the end")


class UnsizedBody:
    """A body that ends with the connection."""

    def __init__(self) -> None:
        self.complete = False
        self.has_rest = False
        self.broken: ProtocolError | None = None

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        self.complete = True


class ChunkedBody:
    """A body in chunks. Extensions and trailers are dropped (RFC 9112 section 7.1)."""

    def __init__(self) -> None:
        self.complete = False
        self.has_rest = False
        self._pieces: list[bytes] = []
        self.broken: ProtocolError | None = None
        self._beside = 0
        """Bytes that have come since the last ones of the body."""
        self._tail = b""
        self._last = 0
        """How many of the pieces had come when the body was complete."""
        self.on_body: Final = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(_CHUNKED_HEAD)

    def on_message_begin(self) -> None:
        self.has_rest = self.complete

    def on_message_complete(self) -> None:
        if not self.complete:
            self.complete = True
            self._last = len(self._pieces)

    def feed(self, data: bytes) -> bytes:
        pieces = self._pieces
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self.complete:
                self.has_rest = True
            else:
                self.broken = ProtocolError(f"its chunks cannot be read: {error}")
        self._tail = (self._tail + data[-6:])[-6:]
        if self.complete and (self._tail[:2] == b"\r\n" or not self._tail.endswith(b"\r\n\r\n")):
            self.has_rest = True  # llhttp passes over empty lines between messages
        if self.has_rest:
            del pieces[self._last :]  # llhttp reads what comes behind as another answer
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._last = 0
        self._beside = 0 if piece else self._beside + len(data)
        if self._beside > HEAD_SIZE_MAX:
            self.broken = ProtocolError(f"there are more than {HEAD_SIZE_MAX} bytes between its chunks' data")
        return piece

    def end(self) -> None:
        raise ProtocolError("it closed the connection between the chunks, or within one")


def body_reader(head: Head, method: str) -> BodyReader:
    """What reads the body behind an answer's head (RFC 9112 section 6.3). Raises `ProtocolError`."""
    codings: list[bytes] = []
    length = b""
    for name, value in head.headers:
        if len(name) == 17 and name.lower() == b"transfer-encoding":
            codings.append(value)
        elif len(name) == 14 and name.lower() == b"content-length":
            length = value
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        raise ProtocolError("its transfer coding is not known here: only chunked is")
    if method == "HEAD" or head.status in _BODILESS:
        return SizedBody(0)
    if codings:
        return ChunkedBody()
    return SizedBody(int(length)) if length else UnsizedBody()


def is_last(head: Head) -> bool:
    """Whether the connection ends with this answer (RFC 9112 section 9.3). HTTP/1.0 is not asked to keep it."""
    if head.version != "1.1":
        return True
    return any(
        len(name) == 10
        and name.lower() == b"connection"
        and b"close" in {token.strip() for token in value.lower().split(b",")}
        for name, value in head.headers
    )
