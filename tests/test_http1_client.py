"""The HTTP/1.1 client on streams in memory: what it says of a connection, and what it does about a body's length."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpcore
import pytest
import trio
import trio.testing

from trioproxy.http1 import Headers, ProtocolError, UnsendableError
from trioproxy.http1_client import Connection, Origin
from trioproxy.upload import Body

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
FIELDS: Headers = [(b"Host", b"x")]


class Timing:
    """Takes down how far a request is."""

    write_timeout = 5.0

    def __init__(self) -> None:
        self.told: list[str] = []

    def connecting(self) -> None:
        self.told.append("connecting")

    def sending(self) -> None:
        self.told.append("sending")

    def sent(self) -> None:
        self.told.append("sent")


class Server:
    """The other end of each connection."""

    def __init__(self) -> None:
        self.ends: list[trio.StapledStream[trio.abc.SendStream, trio.abc.ReceiveStream]] = []
        self.refuses = False

    async def dial(self, host: str, port: int) -> trio.abc.Stream:
        if self.refuses:
            raise OSError("refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self.ends.append(theirs)  # type: ignore[arg-type]
        await theirs.send_all(OK)
        return ours

    def connection(self) -> Connection:
        return Connection(Origin("x", 80, None), self.dial)


async def ask(connection: Connection, body: Body | None = None, *fields: tuple[bytes, bytes]) -> Timing:
    timing = Timing()
    head = await connection.ask("POST", b"/", [*FIELDS, *fields], body or Body(b""), timing)
    assert head.status == 200
    return timing


async def test_one_request_after_another_on_one_connection() -> None:
    server = Server()
    connection = server.connection()
    assert (await ask(connection)).told == ["connecting", "sending", "sent"]
    assert connection.at_hand
    assert [await connection.read(), await connection.read()] == [b"ok", b""]
    assert (connection.whole, connection.is_kept) == (True, True)
    await server.ends[0].send_all(OK)
    assert (await ask(connection)).told == ["sending", "sent"]
    assert len(server.ends) == 1


async def test_a_request_that_gets_no_answer_leaves_nothing_of_the_one_before() -> None:
    server = Server()
    connection = server.connection()
    await ask(connection)
    await connection.read()
    await connection.aclose()
    server.refuses = True
    with pytest.raises(httpcore.ConnectError):
        await ask(connection)
    assert not connection.whole
    assert not connection.is_kept


async def test_an_answer_is_not_whole_before_it_has_been_read() -> None:
    connection = Server().connection()
    await ask(connection)
    assert not connection.whole
    assert not connection.is_kept


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


@pytest.mark.parametrize("body", [b"123", b"12345", b"x" * 1_000_000])
@pytest.mark.parametrize("streams", [False, True])
async def test_a_body_of_another_length_than_said_is_not_passed_on(body: bytes, streams: bool) -> None:
    """What is left of it would be taken for another request, or another request for what is missing."""
    server = Server()
    content = Body(pieces(body[:2], body[2:]) if streams else body)

    async def silent(host: str, port: int) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        server.ends.append(theirs)  # type: ignore[arg-type]
        return ours

    connection = Connection(Origin("x", 80, None), silent)
    with pytest.raises(UnsendableError):
        await ask(connection, content, (b"Content-Length", b"4"))
    assert not connection.is_kept


async def test_a_request_that_could_not_be_sent_on_a_kept_connection_is_sent_on_a_new_one() -> None:
    server = Server()
    connection = server.connection()
    await ask(connection)
    await connection.read()
    await server.ends[0].aclose()
    assert (await ask(connection)).told == ["sending", "sent", "connecting", "sending", "sent"]
    assert len(server.ends) == 2


async def test_a_request_is_not_sent_twice_on_new_connections() -> None:
    server = Server()

    async def hang_up(host: str, port: int) -> trio.abc.Stream:
        ours = await server.dial(host, port)
        await server.ends[-1].receive_stream.aclose()
        await server.ends[-1].send_stream.aclose()
        await ours.receive_some(len(OK))
        return ours

    with pytest.raises(ProtocolError):
        await ask(Connection(Origin("x", 80, None), hang_up))
    assert len(server.ends) == 1
