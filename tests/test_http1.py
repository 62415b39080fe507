"""HTTP/1.1 as its client reads and writes it: tables of heads and bodies, and h11 as an independent reader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioproxy import http1
from trioproxy.http1 import Head, ProtocolError

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """What has been made of an answer's bytes."""

    head: Head
    body: bytes
    whole: bool
    has_rest: bool
    broken: bool


def read(pieces: Iterable[bytes], method: str = "GET", *, closes: bool = True) -> Answer:
    """Read an answer that comes in these pieces, before the connection is closed."""
    reader = http1.HeadReader()
    arriving = iter(pieces)
    while (found := reader.feed(data := next(arriving, b""))) is None:
        if not data:
            raise reader.end()
    head, rest = found
    body = http1.body_reader(head, method)
    content, broken = body.feed(rest), body.broken
    for data in arriving:
        if body.complete or broken:
            body.has_rest = body.complete
            break
        content += body.feed(data)
        broken = body.broken
    if closes and not body.complete:
        try:
            body.end()
        except ProtocolError as error:
            broken = error
    return Answer(head, content, body.complete, body.has_rest, broken is not None)


HEADS = {
    "plain": (OK + b"A: b\r\nc:d\r\n\r\n", 200, [(b"A", b"b"), (b"c", b"d")]),
    "no fields": (OK + b"\r\n", 200, []),
    "no reason": (b"HTTP/1.1 404\r\n\r\n", 404, []),
    "repeated, in their case": (OK + b"x-A: 1\r\nX-a: 2\r\n\r\n", 200, [(b"x-A", b"1"), (b"X-a", b"2")]),
    "blanks around a value": (OK + b"A: \t b c \t \r\n\r\n", 200, [(b"A", b"b c")]),
    "an empty value": (OK + b"A:\r\nB: \r\n\r\n", 200, [(b"A", b""), (b"B", b"")]),
    "bytes above ASCII": (OK + b"A: \xe4\xff\r\n\r\n", 200, [(b"A", b"\xe4\xff")]),
    "a control character, which harms nobody": (OK + b"A: a\x01b\r\n\r\n", 200, [(b"A", b"a\x01b")]),
    "bare LF": (b"HTTP/1.1 200 OK\nA: b\n\n", 200, [(b"A", b"b")]),
    "LF and CRLF mixed": (OK + b"A: b\n\r\n", 200, [(b"A", b"b")]),
    "a folded line": (OK + b"A: b\r\n  c\r\n\r\n", 200, [(b"A", b"b c")]),
    "equal lengths": (OK + b"Content-Length: 0\r\ncontent-length: 0\r\n\r\n", 200, [(b"Content-Length", b"0")]),
    "100 before": (b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\nHTTP/1.1 103 E\r\n\r\n" + OK + b"\r\n", 200, []),
    "101 with its fields": (
        b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        101,
        [(b"Upgrade", b"x"), (b"Connection", b"upgrade")],
    ),
    "101 without Connection": (b"HTTP/1.1 101 X\r\nUpgrade: x\r\n\r\n", 101, [(b"Upgrade", b"x")]),
    "101 without fields": (b"HTTP/1.1 101 X\r\n\r\n", 101, []),
    "999": (b"HTTP/1.1 999 X\r\n\r\n", 999, []),
    "as large as may be": (
        OK + b"A: " + b"a" * (http1.HEAD_SIZE_MAX - 24) + b"\r\n\r\n",
        200,
        [(b"A", b"a" * (http1.HEAD_SIZE_MAX - 24))],
    ),
    "as many fields as may be": (OK + b"A: b\r\n" * http1.FIELDS_MAX + b"\r\n", 200, [(b"A", b"b")] * http1.FIELDS_MAX),
}

NO_HEADS = {
    "an empty line first": b"\r\n\r\n" + OK + b"\r\n",
    "a blank first": b" " + OK + b"\r\n",
    "another protocol": b"220 mail ESMTP\r\n",
    "one byte of another protocol": b"\x15",
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    "two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "no status": b"HTTP/1.1 abc\r\n\r\n",
    "a strange version": b"HTTP/x.y 200 OK\r\n\r\n",
    "no colon": OK + b"A\r\n\r\n",
    "a blank before the colon": OK + b"A : b\r\n\r\n",
    "no name": OK + b": b\r\n\r\n",
    "NUL in a value": OK + b"A: a\0b\r\n\r\n",
    "CR in a value": OK + b"A: a\rb\r\n\r\n",
    "different lengths": OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a list of lengths": OK + b"Content-Length: 1, 2\r\n\r\n",
    "a negative length": OK + b"Content-Length: -1\r\n\r\n",
    "a length with a sign": OK + b"Content-Length: +1\r\n\r\n",
    "no number for a length": OK + b"Content-Length: two\r\n\r\n",
    "an empty length": OK + b"Content-Length:\r\n\r\n",
    "an absurd length": OK + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "a head that is too large": OK + b"A: " + b"a" * http1.HEAD_SIZE_MAX,
    "a whole head that is too large": OK + b"A: " + b"a" * http1.HEAD_SIZE_MAX + b"\r\n\r\n",
    "too many fields": OK + b"A: b\r\n" * (http1.FIELDS_MAX + 1) + b"\r\n",
    "gzip": OK + b"Transfer-Encoding: gzip\r\n\r\n",
    "gzip before chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "chunked before gzip": OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "an empty coding": OK + b"Transfer-Encoding:\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_read(name: str) -> None:
    data, status, fields = HEADS[name]
    found = http1.HeadReader().feed(data + b"rest")
    assert found is not None
    head, rest = found
    assert (head.status, head.headers, rest) == (status, fields, b"rest")
    reader = http1.HeadReader()
    if len(data) < 1000:
        *before, last = [reader.feed(data[at : at + 1]) for at in range(len(data))]
        assert before == [None] * (len(data) - 1)
        assert last == (head, b"")


@pytest.mark.parametrize("name", NO_HEADS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_is_no_head_is_refused(name: str, method: str) -> None:
    with pytest.raises(ProtocolError):
        read([NO_HEADS[name]], method)


@pytest.mark.parametrize("size", [0, 3, len(OK), len(OK) + 5])
def test_a_head_that_is_cut_off(size: int) -> None:
    with pytest.raises(ProtocolError, match="closed the connection"):
        read([(OK + b"A: b\r\n\r\n")[:size]])


BODIES = {
    # name: method, bytes, body, whole, something behind it
    "sized": ("GET", OK + b"Content-Length: 3\r\n\r\nabc", b"abc", True, False),
    "sized, too short": ("GET", OK + b"Content-Length: 3\r\n\r\nab", b"ab", False, False),
    "sized, with more": ("GET", OK + b"Content-Length: 3\r\n\r\nabcd", b"abc", True, True),
    "sized 0": ("GET", OK + b"Content-Length: 0\r\n\r\n", b"", True, False),
    "until the end": ("GET", OK + b"\r\nabc", b"abc", True, False),
    "HEAD": ("HEAD", OK + b"Content-Length: 3\r\n\r\n", b"", True, False),
    "HEAD, chunked": ("HEAD", CHUNKED, b"", True, False),
    "HEAD, with a body": ("HEAD", OK + b"Content-Length: 3\r\n\r\nabc", b"", True, True),
    "204": ("GET", b"HTTP/1.1 204 No\r\n\r\n", b"", True, False),
    "204 with a length and a body": ("GET", b"HTTP/1.1 204 No\r\nContent-Length: 1\r\n\r\na", b"", True, True),
    "304 with a length": ("GET", b"HTTP/1.1 304 No\r\nContent-Length: 9\r\n\r\n", b"", True, False),
    "chunked": ("GET", CHUNKED + b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", b"abc", True, False),
    "chunked, whatever the case": ("GET", OK + b"TRANSFER-encoding: CHUNKED\r\n\r\n0\r\n\r\n", b"", True, False),
    "both framings": (
        "GET",
        OK + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        b"a",
        True,
        False,
    ),
    "extensions": ("GET", CHUNKED + b'1;a=b;c="d"\r\na\r\n0;e\r\n\r\n', b"a", True, False),
    "leading zeros": ("GET", CHUNKED + b"00A\r\n0123456789\r\n000\r\n\r\n", b"0123456789", True, False),
    "trailers": ("GET", CHUNKED + b"1\r\na\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"a", True, False),
    "another answer behind": ("GET", CHUNKED + b"1\r\na\r\n0\r\n\r\n" + OK + b"\r\n", b"a", True, True),
    "another answer behind, with a body": (
        "GET",
        CHUNKED + b"1\r\na\r\n0\r\n\r\n" + OK + b"Content-Length: 6\r\n\r\nSECRET",
        b"a",
        True,
        True,
    ),
    "nonsense behind": ("GET", CHUNKED + b"1\r\na\r\n0\r\n\r\n?", b"a", True, True),
    "an empty line behind": ("GET", CHUNKED + b"1\r\na\r\n0\r\n\r\n\r\n", b"a", True, True),
    "half an empty line behind": ("GET", CHUNKED + b"0\r\n\r\n\n", b"", True, True),
    "no last chunk": ("GET", CHUNKED + b"1\r\na\r\n", b"a", False, False),
    "no end of the trailers": ("GET", CHUNKED + b"1\r\na\r\n0\r\nA: b\r\n", b"a", False, False),
    "cut off in a chunk": ("GET", CHUNKED + b"5\r\nab", b"ab", False, False),
    "cut off in a size": ("GET", CHUNKED + b"5", b"", False, False),
    "no size": ("GET", CHUNKED + b"1\r\na\r\nxyz\r\n", b"a", False, False),
    "a negative size": ("GET", CHUNKED + b"1\r\na\r\n-1\r\n", b"a", False, False),
    "an absurd size": ("GET", CHUNKED + b"1\r\na\r\n" + b"f" * 40 + b"\r\n", b"a", False, False),
    "a chunk that is too long": ("GET", CHUNKED + b"1\r\nab\r\n0\r\n\r\n", b"a", False, False),
    "chunks that end with LF": ("GET", CHUNKED + b"1\na\n0\n\n", b"", False, False),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_read(name: str) -> None:
    method, data, body, whole, has_rest = BODIES[name]
    head_size = data.index(b"\r\n\r\n") + 4
    for pieces in ([data], [data[:head_size], data[head_size:]], [data[at : at + 1] for at in range(len(data))]):
        answer = read(filter(None, pieces), method)
        assert (answer.body, answer.whole, answer.has_rest) == (body, whole, has_rest)
        assert answer.broken == (not whole)


@pytest.mark.parametrize("beside", [b"1;" + b"x" * 200_000 + b"\r\n", b"0\r\n" + b"A: b\r\n" * 30_000])
def test_what_is_beside_the_chunks_is_limited(beside: bytes) -> None:
    data = CHUNKED + beside
    answer = read([data[at : at + 10_000] for at in range(0, len(data), 10_000)], closes=False)
    assert answer.broken


@pytest.mark.parametrize(
    ("head", "last"),
    [
        (OK, False),
        (OK + b"Connection: keep-alive\r\n", False),
        (OK + b"Connection: close\r\n", True),
        (OK + b"connection: X, CLOSE\r\n", True),
        (OK + b"Connection: x\r\nConnection: close\r\n", True),
        (OK + b"Connection: closed\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", True),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n", True),
    ],
)
def test_whether_the_connection_ends_with_an_answer(head: bytes, last: bool) -> None:
    assert http1.is_last(http1.read_head(head + b"\r\n")) is last


def test_a_request_is_written() -> None:
    fields = [(b"Host", b"x"), (b"X-eMpty", b""), (b"X", b"\xe4")]
    assert http1.request_head("get", b"/a?b", fields) == b"get /a?b HTTP/1.1\r\nHost: x\r\nX-eMpty: \r\nX: \xe4\r\n\r\n"
    assert http1.chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


@pytest.mark.parametrize("value", [b"a\r\nB: c", b"a\nB: c", b"a\rb", b"a\0b"])
def test_a_field_that_would_be_two_is_not_written(value: bytes) -> None:
    for field in ((b"A", value), (value, b"b")):
        with pytest.raises(http1.UnsendableError) as raised:
            http1.request_head("GET", b"/", [field])
        assert "B: c" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "size"),
    [([], 0), ([(b"content-LENGTH", b"5")], 5), ([(b"Transfer-encoding", b"chunked")], None)],
)
def test_how_long_a_requests_body_is(fields: http1.Headers, size: int | None) -> None:
    assert http1.upload_size(fields) == size


# Any answer, in any pieces, and as h11 reads it

NAMES = st.text("ABCxyz-_!", min_size=1, max_size=8).map(lambda name: b"X-" + name.encode())
VALUES = st.binary(max_size=20).map(lambda value: bytes(set(value) - {*range(32), 127}).strip())
INTERIM = [b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.1 103 E\r\nA: b\r\n\r\n"]
CONTENTS = st.lists(st.binary(min_size=1, max_size=40), max_size=5)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """A correct answer, interim ones before it; maybe cut off shortly before its end."""
    interim = draw(st.lists(st.sampled_from(INTERIM), max_size=2))
    status = draw(st.sampled_from([200, 204, 304, 404, 500]))
    fields = draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    contents = draw(CONTENTS)
    framing = draw(st.sampled_from(["sized", "chunked", "unsized"]))
    body = b"".join(contents)
    if framing == "sized":
        fields.append((b"Content-Length", b"%d" % len(body)))
    elif framing == "chunked":
        fields.append((b"Transfer-Encoding", b"chunked"))
        extension = draw(st.sampled_from([b"", b";x", b';x="y"']))
        trailers = draw(st.sampled_from([b"", b"T: u\r\n"]))
        body = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in contents)
        body += b"0\r\n%b\r\n" % trailers
    if status in (204, 304):
        body = b""
    head = b"HTTP/1.1 %d X\r\n" % status + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"
    whole = b"".join(interim) + head + body
    return whole[: draw(st.integers(len(whole) - 3, len(whole)))] if draw(st.booleans()) else whole


def split(data: bytes, at: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place for place in at if place < len(data))})
    return [data[begin:end] for begin, end in pairwise(places)]


@given(answers(), st.lists(st.integers(1, 400), max_size=30))
def test_how_it_is_split_changes_nothing(data: bytes, at: list[int]) -> None:
    def result(pieces: list[bytes]) -> object:
        try:
            return read(pieces)
        except ProtocolError:
            return None

    assert result(split(data, at)) == result([data])


def read_by_h11(data: bytes) -> tuple[int, http1.Headers, bytes, bool] | None:
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(data)
    reader.receive_data(b"")
    status, headers, body = 0, [], b""
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, h11.Response):
                status, headers = event.status_code, event.headers.raw_items()
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, headers, body, True
            elif event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                return None
    except h11.RemoteProtocolError:
        return (status, headers, body, False) if status else None


@given(answers())
def test_another_reader_reads_the_same(data: bytes) -> None:
    try:
        answer = read([data])
    except ProtocolError:
        assert read_by_h11(data) is None
    else:
        assert (answer.head.status, answer.head.headers, answer.body, answer.whole) == read_by_h11(data)
