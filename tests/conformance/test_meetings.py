"""Where two things meet: an upload and its read-ahead, TLS and an early answer, a WebSocket and HTTP/2's streams."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import h2.errors
import pytest
import trio
from http2_client import Http2Client, Stream, http2_client
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import CloseConnection

from authority import Authority
from support import Proxy, running_proxy, until
from trioproxy.connection import UNTAKEN_SECONDS

MIB: Final = 2**20
REFUSAL: Final = b"HTTP/1.1 413 Too Large\r\nContent-Length: 100000\r\n\r\n" + 100_000 * b"x"


class Stalling:
    """An upstream that reads a request's head, and then nothing until it is told to."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.url = ""
        self.received = 0
        """Bytes of bodies."""
        self.go = trio.Event()
        self.answer = b""
        """Sent before anything of the body is read."""
        self._tls = tls

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        task_status.started()
        await trio.serve_listeners(self._connection, listeners)

    async def _connection(self, plain: trio.SocketStream) -> None:
        stream: trio.abc.Stream = plain
        if self._tls is not None:
            stream = trio.SSLStream(plain, self._tls, server_side=True, https_compatible=True)
        try:
            head = b""
            while b"\r\n\r\n" not in head:
                head += await stream.receive_some(1000)
            self.received += len(head.partition(b"\r\n\r\n")[2])
            if self.answer:
                await trio.sleep(0.2)  # until the proxy cannot write any more
                await stream.send_all(self.answer)
            await self.go.wait()
            while data := await stream.receive_some(MIB):
                self.received += len(data)
        except trio.BrokenResourceError:
            pass
        finally:
            plain.socket.close()


@asynccontextmanager
async def stalling(tls: ssl.SSLContext | None = None) -> AsyncIterator[Stalling]:
    upstream = Stalling(tls)
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        yield upstream
        nursery.cancel_scope.cancel()


async def test_an_upload_goes_on_after_it_was_read_ahead() -> None:
    """What was read ahead, and what comes behind it, reaches an upstream that reads again, while the client pauses."""
    async with stalling() as upstream, running_proxy(upstream.url) as proxy:
        client = await proxy.connect()
        await client.send_all(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 90000000\r\n\r\n" + 6 * MIB * b"x"
        )
        await trio.sleep(UNTAKEN_SECONDS + 0.5)
        upstream.go.set()
        await until(lambda: upstream.received == 6 * MIB)
        await client.send_all(b"y")
        await until(lambda: upstream.received == 6 * MIB + 1)


@pytest.mark.parametrize("path", ["/v1/files", "/v1/chat/completions"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_an_early_answer_arrives_whole(tmp_path: Path, path: str, encrypted: bool) -> None:
    authority = Authority(tmp_path)
    settings = {"ca_file": str(authority.file)} if encrypted else {}
    async with (
        stalling(authority.serving() if encrypted else None) as upstream,
        running_proxy(upstream.url, upstream=settings) as proxy,
        trio.open_nursery() as nursery,
    ):
        upstream.answer = REFUSAL
        client = await proxy.connect()

        async def upload() -> None:
            try:
                await client.send_all(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {30 * MIB}\r\n\r\n".encode())
                await client.send_all(30 * MIB * b"x")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        nursery.start_soon(upload)
        answer = b""
        with trio.fail_after(20):
            while answer.count(b"x") < 100_000:
                data = await client.receive_some(65536)
                assert data, answer[:200]
                answer += data
        assert answer.startswith(b"HTTP/1.1 413")
        nursery.cancel_scope.cancel()


async def open_websocket(client: Http2Client) -> tuple[int, Stream]:
    """Ask for a WebSocket on a stream of its own (RFC 8441)."""
    await client.until(lambda: client.connection.remote_settings.enable_connect_protocol)
    number = client.connection.get_next_available_stream_id()
    mine = client.streams[number] = Stream()
    fields = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/v1/realtime")]
    client.connection.send_headers(number, [*fields, (":authority", "x"), ("sec-websocket-version", "13")])
    await client.flush()
    return number, mine


@pytest.mark.parametrize("way", ["end", "reset"])
async def test_a_websocket_over_http_2_may_be_left_before_it_is_answered(way: str) -> None:
    async with stalling() as upstream, running_proxy(upstream.url) as proxy, http2_client(proxy.port) as client:
        number, _ = await open_websocket(client)
        await until(lambda: proxy.app.proxy.websockets.taken == 1)
        await trio.sleep(0.1)
        if way == "end":
            client.connection.end_stream(number)
        else:
            client.connection.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        await client.flush()
        await until(lambda: proxy.app.proxy.websockets.taken == 0, 1)


@asynccontextmanager
async def session() -> AsyncIterator[tuple[Proxy, Http2Client, int, Stream]]:
    """A WebSocket over HTTP/2 whose upstream has accepted it and says nothing."""
    from test_websocket import running_peer

    async with running_peer() as peer, running_proxy(peer.url) as proxy, http2_client(proxy.port) as client:
        number, mine = await open_websocket(client)
        await client.until(lambda: mine.status is not None)
        assert mine.status == 200
        yield proxy, client, number, mine


async def test_the_end_of_a_websockets_stream_is_its_end() -> None:
    async with session() as (proxy, client, number, _):
        client.connection.end_stream(number)
        await client.flush()
        await until(lambda: proxy.app.proxy.websockets.taken == 0, 2)


async def test_closing_a_websocket_over_http_2_is_answered() -> None:
    async with session() as (proxy, client, number, mine):
        websocket = Connection(ConnectionType.CLIENT)
        client.connection.send_data(number, websocket.send(CloseConnection(code=4000, reason="bye")))
        await client.flush()
        await client.until(lambda: mine.over)
        assert mine.ended
        websocket.receive_data(bytes(mine.body))
        (closed,) = websocket.events()
        assert isinstance(closed, CloseConnection)
        assert closed.code == 4000
        await until(lambda: proxy.app.proxy.websockets.taken == 0, 2)


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "CONNECT"), (":authority", "x")],
        [
            (":method", "CONNECT"),
            (":protocol", "connect-udp"),
            (":path", "/v1/a"),
            (":scheme", "http"),
            (":authority", "x"),
        ],
        [
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":path", "/v1/ä"),
            (":scheme", "http"),
            (":authority", "x"),
        ],
        [(":method", "GÄT"), (":path", "/v1/models"), (":scheme", "http"), (":authority", "x")],
    ],
    ids=["plain CONNECT", "another protocol", "a path", "a method"],
)
async def test_what_one_stream_asks_for_ends_no_other(fields: list[tuple[str, str]]) -> None:
    async with stalling() as upstream, running_proxy(upstream.url) as proxy, http2_client(proxy.port) as client:
        await client.until(lambda: client.connection.remote_settings.enable_connect_protocol)
        number = client.connection.get_next_available_stream_id()
        mine = client.streams[number] = Stream()
        client.connection.config.validate_outbound_headers = False
        client.connection.send_headers(number, [(name, value) for name, value in fields], end_stream=True)
        await client.flush()
        await client.until(lambda: mine.over)
        assert mine.status == 400
        _, other = await client.request("GET", "/nowhere")
        await client.until(lambda: other.over)
        assert other.status == 404
        assert not client.closed


@pytest.mark.parametrize("name", ["Connection", "Sec-WebSocket-Protocol"])
async def test_fields_that_are_read_as_text_are_refused_if_they_are_none(name: str) -> None:
    async with stalling() as upstream, running_proxy(upstream.url) as proxy:
        client = await proxy.connect()
        await client.send_all(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + name.encode() + b": \xe4\r\n\r\n")
        answer = b""
        with trio.fail_after(20):
            while not answer.endswith(b"}}"):
                answer += await client.receive_some(65536)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b'"code":"invalid_request"' in answer
