"""Plain requests and their answers: what is read and written is what h11 would read and write, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trioproxy.http1 import Headers
from trioproxy.http1_server import Mark, PlainConnection, PlainRequest, read_plain, reason_phrase
from trioproxy.protocols.http1 import Lenient

HEAD_SIZE_MAX = 2000
POST = b"POST /v1/x?y HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2\r\n\r\n{}"
GET = b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\n\r\n"
Answer = tuple[int, Headers, Sequence[bytes]]
OK: Answer = (200, [(b"Content-Type", b"text/plain"), (b"Content-Length", b"2")], [b"ok"])


class Reader:
    """A connection, read and answered as Hypercorn does it; says what happens. With `plain`: h11 only where needed."""

    def __init__(self, answers: Sequence[Answer], *, plain: bool) -> None:
        self.log: list[Any] = []
        self.sent = b""
        self.odd = not plain
        self._answers = list(answers)
        self._h11 = Lenient(h11.SERVER, max_incomplete_event_size=HEAD_SIZE_MAX)
        self._plain = PlainConnection(HEAD_SIZE_MAX) if plain else None
        self._over = self._is_head = False

    def feed(self, data: bytes) -> None:
        """Take in what has come, and answer what has come whole."""
        if self._over:
            return
        (self._plain or self._h11).receive_data(data)
        try:
            while self._step():
                pass
        except h11.RemoteProtocolError:
            self._note("error")
            self._over = True

    def _step(self) -> bool:
        if self._plain is None:
            return self._step_by_h11()
        match self._plain.next_event():
            case PlainRequest(method, target, headers, _):
                self._note(("request", method, target, b"1.1", headers))
            case bytes(piece):
                self._note(piece)
            case Mark.END:
                return self._answer()
            case Mark.ODD:
                data, is_all = self._plain.rest()
                self._plain, self.odd = None, True
                if data:
                    self._h11.receive_data(data)
                if is_all:
                    self._h11.receive_data(b"")
            case Mark.CLOSED:
                self._note("closed")
                self._over = True
                return False
            case Mark.PAUSED | Mark.NEED_DATA:
                return False
        return True

    def _step_by_h11(self) -> bool:
        event = self._h11.next_event()
        if isinstance(event, h11.Request):
            headers = event.headers.raw_items()
            self._note(("request", event.method, event.target, event.http_version, headers))
            self._is_head = event.method == b"HEAD"
        elif isinstance(event, h11.Data):
            self._note(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            return self._answer()
        elif isinstance(event, h11.ConnectionClosed):
            self._note("closed")
            self._over = True
            return False
        return event is not h11.NEED_DATA and event is not h11.PAUSED

    def _note(self, what: Any) -> None:
        """Pieces of a body may be cut in different places."""
        if isinstance(what, bytes) and self.log and isinstance(self.log[-1], bytes):
            self.log[-1] += what
        else:
            self.log.append(what)

    def _answer(self) -> bool:
        self._note("end")
        status, headers, pieces = self._answers.pop(0) if self._answers else OK
        if self._is_head:
            pieces = []
        if self._plain is not None:
            self.sent += self._plain.head(status, headers)
            self.sent += b"".join(self._plain.data(piece) for piece in pieces) + self._plain.end()
        else:
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason_phrase(status)),
                *(h11.Data(data=piece) for piece in pieces),
                h11.EndOfMessage(),
            ):
                self.sent += self._h11.send(event) or b""
        connection = self._plain or self._h11
        states = connection.our_state, connection.their_state
        self._note(states)
        if states == (h11.DONE, h11.DONE):
            connection.start_next_cycle()
            return True
        self._over = self._h11.our_state is not h11.IDLE and self._plain is None
        return False


def compare(pieces: Sequence[bytes], *answers: Answer) -> Reader:
    """Read in both ways; what came of it."""
    reference, ours = Reader(answers, plain=False), Reader(answers, plain=True)
    for piece in pieces:
        reference.feed(piece)
        ours.feed(piece)
        assert (ours.log, ours.sent) == (reference.log, reference.sent)
    return ours


methods = st.sampled_from([b"POST", b"GET", b"HEAD", b"PRI", b"get", b"PROPFIND", b"OPTIONS", b"G(T", b""])
targets = st.sampled_from([b"/v1/x", b"/", b"*", b"http://h/v1", b"/\xff", b"/a b", b"", b"/v1/x?a=%00&b#c", b"//x"])
versions = st.sampled_from(
    [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 ", b""]
)
names = st.sampled_from(
    [
        *(b"Host", b"Content-Length", b"content-length", b"Connection", b"Transfer-Encoding", b"X-Y", b"Upgrade"),
        *(b"Expect", b"Sec-WebSocket-Protocol", b"HTTP2-Settings", b"Keep-Alive", b"X Y", b"X:", b"", b"\xfe"),
    ]
)
values = st.sampled_from(
    [
        *(b"x", b"2", b"02", b"+2", b"2, 2", b"close", b"keep-alive", b"Keep-Alive", b"keep-alive, x", b"upgrade", b""),
        *(b"chunked", b" a  b\t", b"\xff", b"a\x01b", b"a\x00b", b"a\rb", b"100-continue", b"h2c", b"\n folded"),
        b"9" * 25,
    ]
)
ends = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n ", b"\r\r\n"])
colons = st.sampled_from([b": ", b":", b": ", b":\t ", b" : ", b" "])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Requests with at most a few things out of the ordinary."""
    plain = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    if draw(st.booleans()):
        lines = [(b"POST /v1/x HTTP/1.1", b"\r\n"), (b"Host: x", b"\r\n"), (b"Content-Length: 3", b"\r\n")]
        for _ in range(draw(st.integers(0, 2))):
            field = draw(names) + draw(colons) + draw(values)
            lines.insert(draw(st.integers(1, len(lines))), (field, draw(ends)))
        if draw(st.integers(0, 4)) == 0:
            blanks = st.sampled_from([b" ", b"  ", b"\t"])
            line = draw(methods) + draw(blanks) + draw(targets) + draw(blanks) + draw(versions)
            lines[0] = (line, draw(ends))
        if draw(st.integers(0, 4)) == 0:
            del lines[draw(st.integers(0, len(lines) - 1))]
        return draw(st.sampled_from([b"", b"", b"\r\n", b"\n", b"\0"])) + b"".join(map(b"".join, lines)) + b"\r\nabc"
    return plain


@st.composite
def in_pieces(draw: st.DrawFn) -> list[bytes]:
    """What a client sends, cut anywhere; perhaps it closes its side then."""
    data = b"".join(draw(st.lists(requests(), min_size=1, max_size=3)))
    data = data[: draw(st.integers(1, len(data)))] if draw(st.integers(0, 3)) == 0 else data
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=5))})
    return [data[a:b] for a, b in pairwise(cuts)] + [b""] * draw(st.integers(0, 1))


statuses = st.sampled_from([200, 404, 429, 503, 204, 304])
fields = st.lists(
    st.sampled_from(
        [
            (b"Content-Type", b"text/plain"),
            (b"Transfer-Encoding", b"chunked"),
            (b"Connection", b"close"),
            (b"connection", b"x, Close"),
            (b"X-A", b"\xff b"),
            (b"X-A", b""),
        ]
    ),
    max_size=3,
    unique=True,
)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """Answers as the application gives them."""
    status = draw(statuses)
    headers = list(draw(fields))
    pieces: list[bytes] = (
        [] if status in (204, 304) else draw(st.lists(st.sampled_from([b"", b"a", b"bc" * 50]), max_size=3))
    )
    if draw(st.booleans()) and not any(name == b"Transfer-Encoding" for name, _ in headers):
        size = 7 if status in (204, 304) else sum(map(len, pieces))
        headers.insert(draw(st.integers(0, len(headers))), (b"content-length", b"%d" % size))
    return status, headers, pieces


@settings(max_examples=500, deadline=None)
@given(in_pieces(), st.lists(answers(), max_size=3))
@example([POST + GET + POST, b""], [])
@example([b"G", b"ET", GET[3:], b"x"], [])
@example([POST[:-1], b""], [])
@example([b"GET /" + b"x" * HEAD_SIZE_MAX], [])
@example([b"\x16\x03\x01"], [])
@example([POST, POST.replace(b"{}", b"{}"), b"\r\n" + POST], [])
def test_both_read_and_write_the_same(pieces: list[bytes], given_answers: list[Answer]) -> None:
    compare(pieces, *given_answers)


@pytest.mark.parametrize(
    "request_",
    [
        POST,
        GET,
        GET.replace(b"Host", b"Connection: Keep-Alive\r\nhost"),
        POST.replace(b"Host", b"Authorization: Bearer \xff\r\nX-Empty:\r\nHost"),
        b"DELETE /v1/files/a%20b HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_what_clients_send_day_by_day_is_plain(request_: bytes) -> None:
    reader = compare([request_, request_, b""])
    assert not reader.odd
    assert reader.log.count("end") == 2
    assert reader.log[-1] == "closed"


@pytest.mark.parametrize(
    "field",
    [
        b"Connection: close",
        b"Connection: Upgrade, keep-alive",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Content-Length: 1\r\nContent-Length: 1",
        b"Content-Length: -1",
        b"Host: y",
        b"Folded: a\r\n b",
        b"Bad Name: x",
        b"Ctl: \x01",
    ],
)
def test_what_is_out_of_the_ordinary_is_not(field: bytes) -> None:
    assert read_plain(GET.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n\r\n")) is None
    assert compare([GET.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n\r\n")]).odd


@pytest.mark.parametrize(
    "line",
    [b"GET  /v1/models HTTP/1.1", b"GET /v1/models  HTTP/1.1", b"GET /v1/models HTTP/1.1 ", b"GET /v1 /x HTTP/1.1"],
)
def test_a_request_line_with_other_blanks_is_not(line: bytes) -> None:
    assert compare([GET.replace(b"GET /v1/models HTTP/1.1", line)]).odd


def test_a_pipelined_request_waits_and_behind_the_last_one_nothing_is_kept() -> None:
    connection = PlainConnection(HEAD_SIZE_MAX)
    connection.receive_data(GET + POST)
    assert isinstance(connection.next_event(), PlainRequest)
    assert [connection.next_event() for _ in range(3)] == [Mark.END, Mark.PAUSED, Mark.PAUSED]
    connection.head(204, [])
    connection.end()
    connection.start_next_cycle()
    assert isinstance(connection.next_event(), PlainRequest)
    assert [connection.next_event() for _ in range(3)] == [b"{}", Mark.END, Mark.NEED_DATA]
    connection.head(204, [(b"Connection", b"close")])
    connection.receive_data(POST)
    assert (connection.next_event(), connection.rest()) == (Mark.NEED_DATA, (b"", False))


@pytest.mark.parametrize("method", [b"CONNECT", b"HEAD", b"PRI", b"PROPFIND", b"get"])
def test_uncommon_methods_are_not(method: bytes) -> None:
    assert read_plain(GET.replace(b"GET", method)) is None


def test_a_large_body_is_not_copied() -> None:
    connection = PlainConnection(HEAD_SIZE_MAX)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    assert isinstance(connection.next_event(), PlainRequest)
    piece = bytes(60_000)
    connection.receive_data(piece)
    assert connection.next_event() is piece
    assert connection.next_event() is Mark.NEED_DATA


def test_an_answer_of_another_length_than_said_is_an_error() -> None:
    for pieces, reason in ((b"abc", "Too much"), (b"a", "Too little")):
        connection = PlainConnection(HEAD_SIZE_MAX)
        connection.receive_data(GET)
        assert isinstance(connection.next_event(), PlainRequest)
        assert connection.next_event() is Mark.END
        connection.head(200, [(b"Content-Length", b"2")])
        with pytest.raises(h11.LocalProtocolError, match=reason):
            assert connection.data(pieces) + connection.end()
        assert connection.our_state is h11.ERROR


def test_nothing_is_sent_out_of_turn() -> None:
    connection = PlainConnection(HEAD_SIZE_MAX)
    with pytest.raises(h11.LocalProtocolError):
        connection.head(200, [])
    with pytest.raises(h11.LocalProtocolError):
        connection.start_next_cycle()
