"""WebSocket sessions over real sockets: a real client, the real server, and an upstream that does what a test says."""

from __future__ import annotations

import gzip
import json
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, cast

import h2.config
import h2.connection
import h2.events
import httpx
import openai
import pytest
import trio
from trio_websocket import (
    ConnectionClosed,
    WebSocketConnection,
    WebSocketRequest,
    WebSocketServer,
    serve_websocket,
    wrap_client_stream,
)
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage
from wsproto.utilities import generate_accept_token

from authority import Authority
from support import Call, Proxy, Upstream, running_proxy, until
from trioproxy.events import WebSocketClosed, WebSocketOutcome
from trioproxy.observe import logs

REALTIME = "/v1/realtime"
MIB = 2**20

HANDSHAKE = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
HELLO = b"\x81\x85\0\0\0\0hello"


@dataclass
class Peer:
    """An upstream that accepts WebSockets and hands them to the test."""

    url: str = ""
    subprotocol: str | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    requests: list[WebSocketRequest] = field(default_factory=list)
    open: int = 0

    def __post_init__(self) -> None:
        self._sender, self._receiver = trio.open_memory_channel[WebSocketConnection](100)

    async def serve(self, request: WebSocketRequest) -> None:
        """Accept one, and keep it until it is closed."""
        self.requests.append(request)
        self.open += 1
        connection = await request.accept(subprotocol=self.subprotocol, extra_headers=self.headers)
        self._sender.send_nowait(connection)
        await until(lambda: connection.closed is not None, 60)
        self.open -= 1

    async def accepted(self) -> WebSocketConnection:
        """The next one."""
        with trio.fail_after(20):
            return await self._receiver.receive()

    def header(self, name: bytes) -> list[bytes]:
        """The values of that field in the last request."""
        return [value for key, value in self.requests[-1].headers if key.lower() == name]


@asynccontextmanager
async def running_peer(tls: Any = None) -> AsyncIterator[Peer]:
    peer = Peer()
    async with trio.open_nursery() as nursery:
        serve = partial(serve_websocket, peer.serve, "127.0.0.1", 0, tls, max_message_size=64 * MIB)
        server: WebSocketServer = await nursery.start(serve)
        peer.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.port}/v1"
        yield peer
        nursery.cancel_scope.cancel()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with running_peer() as running:
        yield running


@asynccontextmanager
async def connect(
    proxy: Proxy, target: str = REALTIME, tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[WebSocketConnection]:
    """A client's WebSocket, closed at the end if it is not yet."""
    tcp = await proxy.connect()
    stream = tcp if tls is None else trio.SSLStream(tcp, tls, server_hostname="127.0.0.1")
    async with stream, trio.open_nursery() as nursery:
        with trio.fail_after(20):
            options = {"max_message_size": 64 * MIB} | options
            connection = await wrap_client_stream(nursery, stream, "proxy", target, **options)
        yield connection
        with trio.fail_after(20):
            await connection.aclose()
        nursery.cancel_scope.cancel()


def ended(proxy: Proxy) -> list[WebSocketClosed]:
    return [event for event in proxy.recorder.events if isinstance(event, WebSocketClosed)]


async def outcome(proxy: Proxy, count: int = 1) -> str:
    """Wait for the end of so many sessions; how the last one ended. Nothing is left of them."""
    await until(lambda: len(ended(proxy)) == count)
    await until(lambda: proxy.app.proxy.websockets.taken == 0)
    sample = proxy.app.proxy.metrics.registry.get_sample_value
    assert sample("openai_proxy_websockets") == 0
    assert sum(
        sample("openai_proxy_websocket_sessions_total", {"outcome": name.value}) or 0 for name in WebSocketOutcome
    ) == len(ended(proxy))
    return ended(proxy)[-1].progress.outcome.value


async def closed(connection: WebSocketConnection, seconds: float = 5) -> tuple[int, str]:
    """What a WebSocket is closed with."""
    with trio.fail_after(seconds), suppress(ConnectionClosed):
        while True:
            await connection.get_message()
    assert connection.closed is not None
    return connection.closed.code, connection.closed.reason or ""


# Messages


@pytest.mark.parametrize(
    "message",
    ["hello", b"hello", "", b"", "äöü €😀", bytes(range(256)) * 4, "x" * 70_000, "a" * (3 * MIB), b"\0" * (3 * MIB)],
)
async def test_messages_go_through_both_ways(peer: Peer, message: str | bytes) -> None:
    async with running_proxy(peer.url) as proxy, connect(proxy) as client:
        upstream = await peer.accepted()
        for _ in range(2):
            await client.send_message(message)
            received = await upstream.get_message()
            assert (type(received), received == message) == (type(message), True)
            await upstream.send_message(message)
            received = await client.get_message()
            assert (type(received), received == message) == (type(message), True)


async def test_many_messages_keep_their_order(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy, connect(proxy) as client, trio.open_nursery() as nursery:
        upstream = await peer.accepted()

        async def send_all(connection: WebSocketConnection, word: str) -> None:
            for number in range(500):
                await connection.send_message(f"{word} {number}")

        nursery.start_soon(send_all, client, "question")
        nursery.start_soon(send_all, upstream, "answer")
        with trio.fail_after(20):
            assert [await client.get_message() for _ in range(500)] == [f"answer {n}" for n in range(500)]
            assert [await upstream.get_message() for _ in range(500)] == [f"question {n}" for n in range(500)]


async def test_a_message_in_fragments_arrives_whole(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy:
        raw = await Raw.open(proxy)
        upstream = await peer.accepted()
        await raw.send(TextMessage(data="a", message_finished=False))
        await raw.send(Ping(payload=b"between"))
        await raw.send(TextMessage(data="b"))
        assert await upstream.get_message() == "ab"
        assert await raw.event() == Pong(payload=b"between")


async def test_pings_are_answered_on_both_sides(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy, connect(proxy) as client:
        upstream = await peer.accepted()
        with trio.fail_after(2):
            await client.ping(b"from the client")
            await upstream.ping(b"from the upstream")
            await client.pong()
            await upstream.pong()
            await client.send_message("still there")
            assert await upstream.get_message() == "still there"


class Raw:
    """A client that sends any frame, and any bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.protocol = Connection(ConnectionType.CLIENT)
        self.head = b""

    @classmethod
    async def open(cls, proxy: Proxy, handshake: bytes = HANDSHAKE) -> Raw:
        raw = cls(await proxy.connect())
        await raw.stream.send_all(handshake)
        with trio.fail_after(20):
            while b"\r\n\r\n" not in raw.head:
                data = await raw.stream.receive_some()
                assert data, raw.head
                raw.head += data
        raw.head, _, rest = raw.head.partition(b"\r\n\r\n")
        raw.protocol.receive_data(rest)
        return raw

    async def send(self, event: Event) -> None:
        await self.stream.send_all(bytes(self.protocol.send(event)))

    async def event(self) -> Event | None:
        """The next event; None at the connection's end."""
        with trio.fail_after(20):
            while (event := next(iter(self.protocol.events()), None)) is None:
                data = await self.stream.receive_some()
                if not data:
                    return None
                self.protocol.receive_data(data)
        return event


# The handshake


async def test_the_handshake_goes_through_but_for_what_is_the_connections(peer: Peer) -> None:
    peer.subprotocol = "realtime"
    peer.headers = [
        (b"x-upstream", b"1"),
        (b"x-request-id", b"theirs"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
    ]
    fields = [
        (b"Authorization", b"Bearer mine"),
        (b"OpenAI-Beta", b"realtime=v1"),
        (b"X-Priority", b"high"),
        (b"X-Request-Timeout", b"5"),
        (b"Proxy-Authorization", b"secret"),
        (b"X-Request-Id", b"my-id"),
        (b"Cookie", b"c=3"),
        (b"Origin", b"https://example.test"),
    ]
    target = "/v1/realtime//x%2Fy?model=gpt%20realtime&a=%zz&a=?"
    async with running_proxy(peer.url) as proxy:
        async with connect(proxy, target, subprotocols=["realtime", "other"], extra_headers=fields) as client:
            await peer.accepted()
            assert client.subprotocol == "realtime"
            assert peer.requests[-1].path == target
            assert peer.requests[-1].proposed_subprotocols == ("realtime", "other")
            for name, values in {
                b"authorization": [b"Bearer mine"],
                b"openai-beta": [b"realtime=v1"],
                b"cookie": [b"c=3"],
                b"origin": [b"https://example.test"],
                b"x-request-id": [b"my-id"],
                b"x-priority": [],
                b"x-request-timeout": [],
                b"proxy-authorization": [],
                b"sec-websocket-version": [b"13"],
            }.items():
                assert peer.header(name) == values, name
            answered = [(name, value) for name, value in client.handshake_headers if not name.startswith(b"sec-")]
            assert answered == [*peer.headers, (b"x-trioproxy-request-id", b"my-id")]
        assert await outcome(proxy) == "client_closed"
        assert ended(proxy)[0].request.path == "/v1/realtime//x%2Fy"


async def test_an_upstream_key_replaces_the_clients_credentials(peer: Peer) -> None:
    peer.subprotocol = "realtime"
    offered = ["realtime", "openai-insecure-api-key.sk-mine", "openai-organization.org", "openai-project.p"]
    fields = [(b"Authorization", b"Bearer mine"), (b"OpenAI-Organization", b"org"), (b"OpenAI-Project", b"p")]
    async with (
        running_proxy(peer.url, upstream={"api_key": "sk-ours"}) as proxy,
        connect(proxy, subprotocols=offered, extra_headers=fields) as client,
    ):
        await peer.accepted()
        assert client.subprotocol == "realtime"
    assert peer.header(b"authorization") == [b"Bearer sk-ours"]
    assert peer.header(b"openai-organization") == peer.header(b"openai-project") == []
    assert peer.requests[-1].proposed_subprotocols == ("realtime",)


async def test_without_an_upstream_key_a_browsers_credentials_go_through(peer: Peer) -> None:
    offered = ["realtime", "openai-insecure-api-key.sk-mine"]
    async with running_proxy(peer.url) as proxy, connect(proxy, subprotocols=offered) as client:
        await peer.accepted()
        assert client.subprotocol is None
    assert peer.requests[-1].proposed_subprotocols == tuple(offered)


async def refused(proxy: Proxy, target: str = REALTIME) -> httpx.Response:
    """A handshake that must be answered with something else than 101."""
    fields = (line.split(b": ") for line in HANDSHAKE.split(b"\r\n")[2:-2])
    with trio.fail_after(20):
        url = httpx.URL(proxy.url).copy_with(raw_path=target.encode())
        async with proxy.client.stream("GET", url, headers=list(fields)) as answer:  # type: ignore[arg-type]
            answer.extensions["body"] = b"".join([piece async for piece in answer.aiter_raw()])
            return answer


def body_of(answer: httpx.Response) -> bytes:
    """As it came, compressed or not."""
    return cast(bytes, answer.extensions["body"])


def code_of(answer: httpx.Response) -> str:
    return str(json.loads(body_of(answer))["error"]["code"])


@pytest.mark.parametrize(
    ("said", "status", "body"),
    [
        (b"HTTP/1.1 401 No\r\nContent-Type: application/json\r\nContent-Length: 2\r\nX-Up: 1\r\n\r\n{}", 401, b"{}"),
        (b"HTTP/1.1 429 No\r\nTransfer-Encoding: chunked\r\nX-Up: 1\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 429, b"abc"),
        (b"HTTP/1.1 500 No\r\nX-Up: 1\r\n\r\nuntil closed", 500, b"until closed"),
        (b"HTTP/1.1 403 No\r\nX-Up: 1\r\nContent-Length: 2\r\n\r\n\x88\x05", 403, b"\x88\x05"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Up: 1\r\n\r\n", 200, b""),
        (b"HTTP/1.1 404 No\r\nX-Up: 1\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000, 404, b"x" * 300_000),
    ],
)
async def test_an_upstreams_refusal_goes_to_the_client(
    upstream: Upstream, said: bytes, status: int, body: bytes
) -> None:
    async def refuse(call: Call) -> None:
        await call.send(said)
        await call.close()

    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, refuse)
        rejected = await refused(proxy)
        assert (rejected.status_code, body_of(rejected)) == (status, body)
        assert rejected.headers["x-up"] == "1"
        assert rejected.headers["x-request-id"] == rejected.headers["x-trioproxy-request-id"]
        assert await outcome(proxy) == "upstream_refused"
        assert ended(proxy)[0].progress.http_status == status
        assert upstream.calls[0].header("upgrade") == "websocket"
        nursery.cancel_scope.cancel()


async def test_a_compressed_refusal_stays_compressed(upstream: Upstream) -> None:
    body = gzip.compress(b"no")
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer(body, 403, Content_Encoding="gzip"))
        rejected = await refused(proxy)
        assert (rejected.status_code, body_of(rejected)) == (403, body)
        nursery.cancel_scope.cancel()


async def test_a_refusal_that_is_broken_off_does_not_look_whole(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(HANDSHAKE)
        call = await upstream.call()
        await call.send(b"HTTP/1.1 500 No\r\nContent-Length: 10\r\n\r\nabc")
        await call.close()
        received = await read_all(stream)
        assert received.startswith(b"HTTP/1.1 500")
        assert received.endswith(b"\r\n\r\nabc")
        assert await outcome(proxy) == "upstream_error"


async def read_all(stream: trio.SocketStream) -> bytes:
    received = b""
    with trio.fail_after(20), suppress(trio.BrokenResourceError):
        async for data in stream:
            received += data
    return received


async def test_an_upstream_that_cannot_be_reached(upstream: Upstream) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with running_proxy(f"http://127.0.0.1:{unused.getsockname()[1]}/v1") as proxy:
            rejected = await refused(proxy)
            assert (rejected.status_code, code_of(rejected)) == (502, "upstream_unreachable")
            assert rejected.headers["x-should-retry"] == "true"
            assert await outcome(proxy) == "upstream_error"
            assert "refused" in str(ended(proxy)[0].progress.error).lower()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"Upgrade": "h2c"}, "something else"),
        ({"Sec-WebSocket-Accept": "wrong"}, "Sec-WebSocket-Accept"),
        ({"Sec-WebSocket-Protocol": "unasked"}, "subprotocol"),
        ({"Sec-WebSocket-Extensions": "permessage-deflate"}, "extension"),
    ],
)
async def test_an_answer_101_to_something_else_is_refused(
    upstream: Upstream, changed: dict[str, str], reason: str
) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: switch(call, **changed))
        rejected = await refused(proxy)
        assert (rejected.status_code, code_of(rejected)) == (502, "upstream_protocol_error")
        assert reason.encode() in body_of(rejected)
        assert await outcome(proxy) == "upstream_error"
        await until(lambda: upstream.open_connections == 0)
        nursery.cancel_scope.cancel()


async def switch(call: Call, **changed: str) -> None:
    """Answer a handshake with 101."""
    key = (call.header("sec-websocket-key") or "").encode()
    accept = generate_accept_token(key).decode()
    fields = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept} | changed
    lines = ["HTTP/1.1 101 X", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    await call.send("\r\n".join(lines).encode())


async def test_an_upstream_that_does_not_answer_the_handshake(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, upstream={"first_byte_timeout": 0.2}) as proxy:
        rejected = await refused(proxy)
        assert (rejected.status_code, code_of(rejected)) == (504, "upstream_timeout")
        assert await outcome(proxy) == "upstream_error"


async def test_what_is_not_under_v1_is_refused_and_counted(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy:
        for target, status, code in (
            ("/realtime", 404, "not_found"),
            ("/health", 404, "not_found"),
            ("/v1/%2e%2e/x", 400, "invalid_request"),
        ):
            rejected = await refused(proxy, target)
            assert (rejected.status_code, code_of(rejected)) == (status, code)
        assert [event.ending.code for event in proxy.recorder.refused] == ["not_found", "not_found", "invalid_request"]
        assert ended(proxy) == []
        assert (await proxy.client.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("handshake", "reason"),
    [
        (HANDSHAKE.replace(b"Sec-WebSocket-Key", b"X"), b"no Sec-WebSocket-Key"),
        (HANDSHAKE.replace(b"Sec-WebSocket-Version", b"X"), b"no Sec-WebSocket-Version of 13"),
        (HANDSHAKE.replace(b"Version: 13", b"Version: 8"), b"no Sec-WebSocket-Version of 13"),
        (HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0"), b"needs HTTP/1.1"),
    ],
    ids=["no key", "no version", "another version", "HTTP/1.0"],
)
async def test_a_handshake_that_is_none_is_refused_and_closes_its_connection(handshake: bytes, reason: bytes) -> None:
    async with running_proxy("http://127.0.0.1:9/v1") as proxy:
        stream = await proxy.connect()
        await stream.send_all(handshake)
        with trio.fail_after(3):
            answer = await read_all(stream)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"\r\nx-request-id: req_" in answer
        assert b'"code":"invalid_request"' in answer
        assert reason in answer
        assert [event.ending.code for event in proxy.recorder.refused] == ["invalid_request"]


@pytest.mark.parametrize("status", [404, 502])
async def test_a_refused_handshake_followed_by_data_hurts_nobody(upstream: Upstream, status: int) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer(status=status))
        for _ in range(5):
            stream = await proxy.connect()
            await stream.send_all(HANDSHAKE)
            await stream.receive_some()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(HELLO * 3)
            await stream.aclose()
        await until(lambda: len(ended(proxy)) == 5)
        assert (await proxy.client.get("/health")).json()["status"] == "ok"
        nursery.cancel_scope.cancel()


async def test_messages_before_the_handshake_is_answered_wait_for_that(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(HANDSHAKE)
        call = await upstream.call()
        await stream.send_all(HELLO)
        await trio.sleep(0.1)
        await switch(call)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")
        await until(lambda: proxy.app.proxy.websockets.taken == 1)
        await stream.send_all(b"\x88\x82\0\0\0\0\x03\xe8")
        assert await outcome(proxy) == "client_closed"
        assert ended(proxy)[0].progress.messages_in == 1


@pytest.mark.parametrize("way", ["fin", "reset"])
async def test_a_client_that_leaves_behind_an_early_message_is_noticed(
    upstream: Upstream, capfd: pytest.CaptureFixture[str], way: str
) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(HANDSHAKE)
        call = await upstream.call()
        await stream.send_all(HELLO)
        await trio.sleep(0.05)
        vanish(stream, way)
        with trio.fail_after(3):
            await call.gone.wait()
        assert await outcome(proxy) == "client_gone"
        assert (await proxy.client.get("/health")).status_code == 200
    assert "a connection failed" not in capfd.readouterr().out


async def test_messages_in_one_piece_with_the_handshake_wait_for_its_answer(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(HANDSHAKE + HELLO * 3)
        upstream = await peer.accepted()
        assert [await upstream.get_message() for _ in range(3)] == ["hello"] * 3
        await stream.aclose()
        assert await outcome(proxy) == "client_gone"


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("path", [b"/v1/realtime", b"/nothing"])
async def test_messages_behind_a_handshake_that_is_refused_go_unread(
    upstream: Upstream, capfd: pytest.CaptureFixture[str], path: bytes, pieces: int
) -> None:
    async with running_proxy(upstream.url, server={"max_websockets": 0}) as proxy:
        for _ in range(3):
            stream = await proxy.connect()
            for piece in [HANDSHAKE.replace(b"/v1/realtime", path) + HELLO, HELLO * 3][:pieces]:
                await stream.send_all(piece)
            answer = await read_all(stream)
            assert answer.startswith(b"HTTP/1.1 404" if path == b"/nothing" else b"HTTP/1.1 503")
            assert answer.count(b"HTTP/1.1") == 1
        assert (await proxy.client.get("/health")).status_code == 200
    assert "a connection failed" not in capfd.readouterr().out


# Closing


@pytest.mark.parametrize(("code", "reason"), [(1000, None), (1000, "done"), (3333, "tired"), (4999, "x" * 123)])
async def test_what_the_client_closes_with_goes_to_the_upstream(peer: Peer, code: int, reason: str | None) -> None:
    async with running_proxy(peer.url) as proxy, trio.open_nursery() as nursery:
        async with connect(proxy) as client:
            upstream = await peer.accepted()
            for number in range(5):
                await client.send_message(str(number))
            nursery.start_soon(client.aclose, code, reason)
            assert [await upstream.get_message() for _ in range(5)] == list("01234")
            assert await closed(upstream) == (code, reason or "")
        assert await outcome(proxy) == "client_closed"
        assert ended(proxy)[0].progress.close_code == code
        assert ended(proxy)[0].progress.messages_in == 5


async def test_a_client_that_closes_without_a_code(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy:
        raw = await Raw.open(proxy)
        upstream = await peer.accepted()
        await raw.stream.send_all(b"\x88\x80\0\0\0\0")
        assert await closed(upstream) == (1000, "")
        assert isinstance(await raw.event(), CloseConnection)
        assert await raw.event() is None
        assert await outcome(proxy) == "client_closed"


@pytest.mark.parametrize(("code", "reason"), [(1000, None), (1001, "away"), (3000, "x"), (4999, "x" * 123)])
async def test_what_the_upstream_closes_with_goes_to_the_client(peer: Peer, code: int, reason: str | None) -> None:
    async with running_proxy(peer.url) as proxy, trio.open_nursery() as nursery:
        async with connect(proxy) as client:
            upstream = await peer.accepted()
            for number in range(5):
                await upstream.send_message(str(number))
            nursery.start_soon(upstream.aclose, code, reason)
            assert [await client.get_message() for _ in range(5)] == list("01234")
            assert await closed(client) == (code, reason or "")
        assert await outcome(proxy) == "upstream_closed"
        assert ended(proxy)[0].progress.close_code == code


async def test_a_message_behind_the_upstreams_closing_is_dropped(peer: Peer) -> None:
    """What one task reads another may not know yet."""
    async with running_proxy(peer.url) as proxy:
        for number in range(1, 40):
            async with connect(proxy) as client, trio.open_nursery() as nursery:
                upstream = await peer.accepted()
                nursery.start_soon(client.send_message, "x" * 10_000)
                nursery.start_soon(client.send_message, "y")
                nursery.start_soon(upstream.aclose, 1000)
                assert (await closed(client))[0] == 1000
            assert await outcome(proxy, number) == "upstream_closed"


def vanish(stream: trio.SocketStream, way: str) -> None:
    if way == "half-close":
        stream.socket.shutdown(socket.SHUT_WR)
        return
    if way == "reset":
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@pytest.mark.parametrize("way", ["fin", "half-close", "reset"])
@pytest.mark.parametrize("phase", ["handshake", "idle", "not reading"])
async def test_no_upstream_session_outlives_a_client_that_vanishes(upstream: Upstream, way: str, phase: str) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        stream = await proxy.connect()
        await stream.send_all(HANDSHAKE)
        call = await upstream.call()
        if phase != "handshake":
            await switch(call)
            await stream.receive_some()
        if phase == "not reading":
            nursery.start_soon(flood, call)
            await trio.sleep(0.2)
        began = trio.current_time()
        vanish(stream, way)
        with trio.fail_after(3):
            await call.gone.wait()
        assert trio.current_time() - began < 0.5
        assert await outcome(proxy) == "client_gone"


@pytest.mark.parametrize("way", ["fin", "half-close"])
async def test_a_client_that_vanishes_right_behind_its_handshake(
    upstream: Upstream, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What would end the session later is not to be what ends it.
    monkeypatch.setattr("trioproxy.streams.CLOSING_SECONDS", 60)
    monkeypatch.setattr("trioproxy.streams.LOOK_SECONDS", 60)
    async with running_proxy(upstream.url) as proxy:
        for count in range(1, 21):  # which is read before the session's task has had its first turn, or after
            stream = await proxy.connect()
            os.write(stream.socket.fileno(), HANDSHAKE)
            vanish(stream, way)
            assert await outcome(proxy, count) == "client_gone"
        with trio.fail_after(20):
            for call in upstream.calls:
                await call.gone.wait()


async def test_a_client_that_vanishes_before_messages_that_nobody_takes(upstream: Upstream) -> None:
    with trio.fail_after(20):
        async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
            stream = await proxy.connect()
            await stream.send_all(HANDSHAKE)
            call = await upstream.call()
            call.stream.receive_some = trio.sleep_forever  # type: ignore[method-assign,assignment]
            await switch(call)
            await stream.receive_some()
            sent = trio.current_time()

            async def talk() -> None:
                nonlocal sent
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while True:
                        await stream.send_all(b"\x82\xff" + struct.pack("!QI", 65536, 0) + b"x" * 65536)
                        sent = trio.current_time()

            nursery.start_soon(talk)
            await until(lambda: trio.current_time() - sent > 0.3)
            vanish(stream, "reset")
            assert await outcome(proxy) == "client_gone"


async def flood(call: Call) -> None:
    """Send messages without end."""
    frame = b"\x82\x7f" + struct.pack("!Q", 65536) + b"x" * 65536
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await call.send(frame)


@pytest.mark.parametrize("said", [b"", b"\x81\x05he", b"\xff\xff\xff\xff", b"\x81\x02\xc3\x28", b"\x88\x02\x03\xee"])
async def test_an_upstream_that_breaks_off_never_looks_like_a_proper_end(upstream: Upstream, said: bytes) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:

        async def break_off(call: Call) -> None:
            await switch(call)
            await call.send(b"\x81\x05hello" + said)
            await trio.sleep(0.05)
            await call.close()

        nursery.start_soon(upstream.behave, break_off)
        async with connect(proxy) as client:
            assert await client.get_message() == "hello"
            code, reason = await closed(client)
            assert code == 1011
            assert reason
        assert await outcome(proxy) == "upstream_error"
        assert ended(proxy)[0].progress.error
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("said", [b"\xff\xff\xff\xff", b"\x81\x82\0\0\0\0\xc3\x28", b"\x81\x05hello"])
async def test_a_client_that_sends_nonsense_is_cut_off(peer: Peer, said: bytes) -> None:
    async with running_proxy(peer.url) as proxy:
        raw = await Raw.open(proxy)
        upstream = await peer.accepted()
        await raw.stream.send_all(said)
        await closed(upstream)
        with suppress(trio.BrokenResourceError):
            while await raw.event() is not None:
                pass
        await outcome(proxy)
        assert (await proxy.client.get("/health")).status_code == 200


async def test_an_upstream_that_does_not_answer_the_closing_is_left(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, switch)
        async with connect(proxy) as client:
            await client.aclose(1000)
        with trio.fail_after(3):
            await upstream.calls[0].gone.wait()
        assert await outcome(proxy) == "client_closed"
        nursery.cancel_scope.cancel()


async def test_a_client_that_does_not_answer_the_closing_is_left(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy:
        raw = await Raw.open(proxy)
        upstream = await peer.accepted()
        with trio.fail_after(20):
            await upstream.aclose(1000)
            assert isinstance(await raw.event(), CloseConnection)
            assert await raw.event() is None
        assert await outcome(proxy) == "upstream_closed"


# Limits


async def test_a_message_of_the_client_that_is_too_large(peer: Peer) -> None:
    async with running_proxy(peer.url, server={"websocket_max_message_size": 1000}) as proxy:
        async with connect(proxy) as client:
            upstream = await peer.accepted()
            await client.send_message("x" * 1000)
            assert await upstream.get_message() == "x" * 1000
            await client.send_message("x" * 1001)
            assert (await closed(client))[0] == 1009
            assert (await closed(upstream))[0] == 1009
        assert await outcome(proxy) == "too_large"


async def test_a_client_that_goes_on_with_a_message_that_is_too_large_costs_no_memory(peer: Peer) -> None:
    async with running_proxy(peer.url, server={"websocket_max_message_size": MIB}) as proxy:
        raw = await Raw.open(proxy)
        upstream = await peer.accepted()
        before = memory()
        piece = bytes(raw.protocol.send(BytesMessage(data=bytearray(65536), message_finished=False)))
        with trio.fail_after(20), suppress(trio.BrokenResourceError):
            for _ in range(1600):
                await raw.stream.send_all(piece)
                piece = b"\x00" + piece[1:]
        assert (await closed(upstream))[0] == 1009
        assert memory() - before < 24 * MIB
        assert await outcome(proxy) == "too_large"


def memory() -> int:
    """Bytes resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def test_a_message_of_the_upstream_that_is_too_large(peer: Peer) -> None:
    async with running_proxy(peer.url, server={"websocket_max_message_size": 1000}) as proxy:
        async with connect(proxy) as client:
            upstream = await peer.accepted()
            await upstream.send_message("x" * 1000)
            assert await client.get_message() == "x" * 1000
            with suppress(ConnectionClosed):
                await upstream.send_message("x" * 1001)
            assert (await closed(client))[0] == 1009
            assert (await closed(upstream))[0] == 1009
        assert await outcome(proxy) == "too_large"


async def test_sixteen_mebibytes_are_taken_by_default(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy, connect(proxy) as client:
        upstream = await peer.accepted()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send_message, b"x" * (16 * MIB))
                assert len(await upstream.get_message()) == 16 * MIB
                nursery.start_soon(upstream.send_message, "x" * (16 * MIB))
                assert len(await client.get_message()) == 16 * MIB


@pytest.mark.parametrize("slow", ["client", "upstream"])
async def test_a_side_that_does_not_read_holds_the_other_back(peer: Peer, slow: str) -> None:
    async with running_proxy(peer.url) as proxy:
        async with connect(proxy, message_queue_size=0) as client, trio.open_nursery() as nursery:
            upstream = await peer.accepted()
            sender, receiver = (upstream, client) if slow == "client" else (client, upstream)
            sent = 0

            async def pump() -> None:
                nonlocal sent
                with suppress(ConnectionClosed):
                    while sent < 400:
                        await sender.send_message(sent.to_bytes(4, "big") + b"x" * (256 * 1024))
                        sent += 1

            before = memory()
            nursery.start_soon(pump)
            await trio.sleep(1)
            held = sent
            await trio.sleep(0.5)
            assert sent == held < 200
            assert memory() - before < 48 * MIB
            with trio.fail_after(30):
                for number in range(400):
                    message = await receiver.get_message()
                    assert isinstance(message, bytes)
                    assert int.from_bytes(message[:4], "big") == number
        assert await outcome(proxy) == "client_closed"


async def test_a_client_that_stops_reading_is_cut_off(upstream: Upstream) -> None:
    settings = {"client_write_timeout": 0.3}
    async with running_proxy(upstream.url, server=settings) as proxy, trio.open_nursery() as nursery:
        stream = await proxy.connect()
        await stream.send_all(HANDSHAKE)
        call = await upstream.call()
        await switch(call)
        nursery.start_soon(flood, call)
        with trio.fail_after(3):
            await call.gone.wait()
        assert await outcome(proxy) == "client_gone"


@pytest.mark.parametrize("way", ["stops reading", "resets"])
async def test_an_upstream_that_takes_no_more_is_given_up(upstream: Upstream, way: str) -> None:
    async with running_proxy(upstream.url, upstream={"idle_timeout": 0.3}) as proxy, trio.open_nursery() as nursery:

        async def accept(call: Call) -> None:
            await switch(call)
            socket_stream = call.stream
            assert isinstance(socket_stream, trio.SocketStream)
            if way == "resets":
                vanish(socket_stream, "reset")
            else:
                socket_stream.receive_some = trio.sleep_forever  # type: ignore[method-assign,assignment]

        nursery.start_soon(upstream.behave, accept)
        async with connect(proxy) as client:
            with suppress(ConnectionClosed):
                for _ in range(40):
                    await client.send_message(b"x" * MIB)
            assert (await closed(client))[0] in (1011, 1006)
        assert await outcome(proxy) == "upstream_error"
        nursery.cancel_scope.cancel()


async def test_a_bug_costs_one_session(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    async with running_proxy(peer.url) as proxy:
        with monkeypatch.context() as patched:
            patched.setattr("trioproxy.websocket.new_key", fail)
            rejected = await refused(proxy)
        assert (rejected.status_code, code_of(rejected)) == (500, "internal_error")
        assert await outcome(proxy) == "proxy_error"
        async with connect(proxy):
            pass
        assert await outcome(proxy, 2) == "client_closed"


async def test_there_are_only_so_many_at_once(peer: Peer) -> None:
    async with running_proxy(peer.url, server={"max_websockets": 2}) as proxy:
        sample = proxy.app.proxy.metrics.registry.get_sample_value
        async with connect(proxy), connect(proxy):
            assert sample("openai_proxy_websockets") == 2
            rejected = await refused(proxy)
            assert (rejected.status_code, code_of(rejected)) == (503, "too_many_websockets")
            assert rejected.headers["retry-after"] == "5"
            assert 3000 < int(rejected.headers["retry-after-ms"]) < 7000
            assert rejected.headers["x-should-retry"] == "true"
            assert b"2 WebSocket" in body_of(rejected)
            await until(lambda: ended(proxy))
            assert ended(proxy)[-1].progress.outcome == "rejected"
        await until(lambda: proxy.app.proxy.websockets.taken == 0)
        async with connect(proxy):
            pass
        assert await outcome(proxy, 4) == "client_closed"
        assert len(peer.requests) == 3


async def test_none_may_be_allowed_at_all(peer: Peer) -> None:
    async with running_proxy(peer.url, server={"max_websockets": 0}) as proxy:
        assert (await refused(proxy)).status_code == 503


async def test_a_session_without_a_message_is_closed(peer: Peer) -> None:
    settings = {"websocket_idle_timeout": 0.5, "keep_alive_timeout": 0.1}
    async with running_proxy(peer.url, server=settings) as proxy, connect(proxy) as client:
        upstream = await peer.accepted()
        for _ in range(4):
            await trio.sleep(0.3)
            await client.send_message("x")
            await trio.sleep(0.3)
            await upstream.send_message("y")
            assert await client.get_message() == "y"
        began = trio.current_time()
        assert await closed(client) == (1001, "no message for 0.5 s")
        assert 0.3 < trio.current_time() - began < 1.5
        assert (await closed(upstream))[0] == 1001
        assert await outcome(proxy) == "idle"


async def test_at_the_end_of_the_grace_sessions_are_closed_properly(peer: Peer) -> None:
    async with running_proxy(peer.url, server={"shutdown_grace": 0.5}) as proxy, connect(proxy) as client:
        upstream = await peer.accepted()
        proxy.server.shut_down()
        await trio.sleep(0.1)
        rejected = await refused(proxy)
        assert (rejected.status_code, code_of(rejected)) == (503, "shutting_down")
        await client.send_message("still served")
        assert await upstream.get_message() == "still served"
        began = trio.current_time()
        assert await closed(client) == (1001, "the proxy is shutting down")
        assert 0.2 < trio.current_time() - began < 1.2
        assert (await closed(upstream))[0] == 1001
        assert await outcome(proxy, 2) == "shutdown"


async def test_the_shutdown_waits_for_no_client_that_does_not_read(upstream: Upstream) -> None:
    with trio.fail_after(20):
        async with running_proxy(upstream.url, server={"shutdown_grace": 0.2}) as proxy, trio.open_nursery() as nursery:
            stream = await proxy.connect()
            await stream.send_all(HANDSHAKE)
            call = await upstream.call()
            await switch(call)
            nursery.start_soon(flood, call)
            await trio.sleep(0.3)
            proxy.server.shut_down()
            await call.gone.wait()
            await outcome(proxy)


# What is told of it


async def test_it_is_logged_once_and_says_nothing_of_what_was_said(peer: Peer, tmp_path: Path) -> None:
    writer = logs.configure("info", "json", tmp_path / "proxy.log", StringIO())
    async with running_proxy(peer.url, server={"max_websockets": 1}) as proxy:
        fields = [(b"Authorization", b"Bearer secret-key"), (b"X-Request-Id", b"mine")]
        offered = ["realtime", "openai-insecure-api-key.secret-key"]
        async with connect(
            proxy, REALTIME + "?token=secret-query", extra_headers=fields, subprotocols=offered
        ) as client:
            upstream = await peer.accepted()
            await client.send_message("secret-text")
            await upstream.get_message()
            await upstream.send_message(b"secret-bytes!")
            await client.get_message()
            await refused(proxy)
        await outcome(proxy, 2)
    writer.close()
    text = (tmp_path / "proxy.log").read_text()
    assert "secret" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    rejected, line = (line for line in lines if line["event"] == "websocket closed")
    assert (rejected["websocket_outcome"], rejected["http_status"], "error" in rejected) == ("rejected", 503, False)
    assert (
        line.items()
        >= {
            "level": "info",
            "request_id": "mine",
            "method": "GET",
            "path": REALTIME,
            "http_status": 101,
            "close_code": 1000,
            "websocket_outcome": "client_closed",
            "messages_in": 1,
            "messages_out": 1,
            "bytes_in": 11,
            "bytes_out": 13,
        }.items()
    )
    assert line["total_seconds"] > 0
    assert not {"outcome", "error", "status"} & line.keys()


async def test_the_metrics_are_there_from_the_start(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy:
        text = (await proxy.client.get("/metrics")).text
        assert "openai_proxy_websockets 0.0" in text
        for name in WebSocketOutcome:
            assert f'openai_proxy_websocket_sessions_total{{outcome="{name.value}"}} 0.0' in text


# Other clients and transports


async def test_over_tls_on_both_sides(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    settings: dict[str, dict[str, Any]] = {
        "server": authority.settings(websocket_max_message_size=100_000),
        "upstream": {"ca_file": str(authority.file)},
    }
    trust = authority.trusting()
    async with running_peer(authority.serving()) as peer, running_proxy(peer.url, (), trust, **settings) as proxy:
        async with connect(proxy, tls=authority.trusting()) as client:
            upstream = await peer.accepted()
            await client.send_message("x" * 100_000)
            assert await upstream.get_message() == "x" * 100_000
            await upstream.send_message(b"y" * 100_000)
            assert await client.get_message() == b"y" * 100_000
            await client.aclose(4000, "over TLS")
            assert await closed(upstream) == (4000, "over TLS")
        assert await outcome(proxy) == "client_closed"
        async with connect(proxy, tls=authority.trusting()) as client:
            await peer.accepted()
            await client.send_message("x" * 100_001)
            assert (await closed(client))[0] == 1009
        assert await outcome(proxy, 2) == "too_large"


async def test_an_upstream_whose_certificate_is_not_accepted(tmp_path: Path) -> None:
    async with running_peer(Authority(tmp_path).serving()) as peer, running_proxy(peer.url) as proxy:
        rejected = await refused(proxy)
        assert (rejected.status_code, code_of(rejected)) == (502, "upstream_unreachable")
        assert b"unable to get local issuer certificate" in body_of(rejected)


async def test_the_openai_sdks_realtime_client(peer: Peer) -> None:
    async with running_proxy(peer.url) as proxy, trio.open_nursery() as nursery:

        def talk() -> list[str]:
            client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="sk-mine")
            with client.realtime.connect(model="gpt-realtime") as connection:
                connection.session.update(session={"type": "realtime", "instructions": "be brief"})
                connection.input_audio_buffer.append(audio="AAAA" * 300_000)
                return [connection.recv().type for _ in range(2)]

        async def answer() -> None:
            upstream = await peer.accepted()
            assert peer.requests[-1].path == "/v1/realtime?model=gpt-realtime"
            assert peer.header(b"authorization") == [b"Bearer sk-mine"]
            for kind, reply in (("session.update", "session.updated"), ("input_audio_buffer.append", "response.done")):
                message = json.loads(await upstream.get_message())
                assert message["type"] == kind
                await upstream.send_message(json.dumps({"type": reply, "event_id": "e", "session": {}, "response": {}}))
            assert await closed(upstream) == (1000, "")

        nursery.start_soon(answer)
        assert await trio.to_thread.run_sync(talk) == ["session.updated", "response.done"]
        assert await outcome(proxy) == "client_closed"


async def test_http_2_clients(peer: Peer) -> None:
    """RFC 8441: a WebSocket as one of an HTTP/2 connection's streams."""
    async with running_proxy(peer.url) as proxy:
        stream = await proxy.connect()
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        fields = [
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "http"),
            (":path", "/v1/realtime?model=m"),
            (":authority", "proxy"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-protocol", "realtime"),
            ("authorization", "Bearer mine"),
        ]
        peer.subprotocol = "realtime"
        websocket = Connection(ConnectionType.CLIENT)
        received: list[Event] = []
        heads: list[dict[str, str]] = []

        async def receive(enough: Callable[[], bool]) -> None:
            with trio.fail_after(20):
                while not enough():
                    await stream.send_all(connection.data_to_send())
                    for event in connection.receive_data(bytes(await stream.receive_some())):
                        if isinstance(event, h2.events.ResponseReceived):
                            heads.append({str(name): str(value) for name, value in event.headers})
                        elif isinstance(event, h2.events.DataReceived):
                            websocket.receive_data(event.data)
                            received.extend(websocket.events())

        await receive(lambda: bool(connection.remote_settings.enable_connect_protocol))
        connection.send_headers(1, fields)
        await receive(lambda: bool(heads))
        assert heads[0].items() >= {":status": "200", "sec-websocket-protocol": "realtime"}.items()
        upstream = await peer.accepted()
        assert peer.requests[-1].path == "/v1/realtime?model=m"
        connection.send_data(1, bytes(websocket.send(TextMessage(data="over HTTP/2"))))
        await stream.send_all(connection.data_to_send())
        assert await upstream.get_message() == "over HTTP/2"
        await upstream.send_message("answer")
        await receive(lambda: bool(received))
        assert isinstance(received[0], TextMessage)
        assert received[0].data == "answer"
        await stream.aclose()
        await closed(upstream)
        assert await outcome(proxy) == "client_gone"
