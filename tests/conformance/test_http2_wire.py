"""HTTP/2 clients, frame by frame (RFC 9113): fidelity, each stream's own fate, windows that stay closed."""

from __future__ import annotations

import gc
import json
from contextlib import suppress
from functools import partial
from typing import Any, Final

import h2.errors
import pytest
import trio
from case import CHAT, OK, answer, chunked
from http2_client import Fields, Http2Client, http2_client
from wire import Deaf, End, Pause, Script, Until, Wait, raw_upstream

from support import Upstream, running_proxy, until
from trioproxy.connection import UNTAKEN_SECONDS
from trioproxy.protocols.http2 import Http2

BASE: Final = b"Host: UPSTREAM\r\n"


@pytest.mark.parametrize(
    ("name", "method", "path", "fields", "body", "forwarded"),
    [
        (
            "path and query",
            "GET",
            "/v1//a%20b/?x=%zz&&y",
            (),
            None,
            b"GET /v1//a%20b/?x=%zz&&y HTTP/1.1\r\n" + BASE + b"\r\n",
        ),
        ("a method in lower case", "get", "/v1/models", (), None, b"get /v1/models HTTP/1.1\r\n" + BASE + b"\r\n"),
        (
            "fields in order",
            "GET",
            "/v1/models",
            (("x-a", "1"), ("accept", "*/*"), ("x-a", "2"), ("authorization", "Bearer x"), ("x-empty", "")),
            None,
            b"GET /v1/models HTTP/1.1\r\n"
            + BASE
            + b"x-a: 1\r\naccept: */*\r\nx-a: 2\r\nauthorization: Bearer x\r\nx-empty: \r\n\r\n",
        ),
        (
            "cookies become one field (RFC 9113 8.2.3)",
            "GET",
            "/v1/models",
            (("cookie", "a=1"), ("x-a", "1"), ("cookie", "b=2")),
            None,
            b"GET /v1/models HTTP/1.1\r\n" + BASE + b"x-a: 1\r\ncookie: a=1; b=2\r\n\r\n",
        ),
        (
            "TE stays here (RFC 9113 8.2.2)",
            "GET",
            "/v1/models",
            (("te", "trailers"),),
            None,
            b"GET /v1/models HTTP/1.1\r\n" + BASE + b"\r\n",
        ),
        (
            "a body of unknown length",
            "POST",
            "/v1/files",
            (),
            b"abc",
            b"POST /v1/files HTTP/1.1\r\n" + BASE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ),
        (
            "a body of known length",
            "POST",
            "/v1/files",
            (("content-length", "3"),),
            b"abc",
            b"POST /v1/files HTTP/1.1\r\n" + BASE + b"Content-Length: 3\r\n\r\nabc",
        ),
        ("an empty body", "POST", "/v1/files", (), b"", b"POST /v1/files HTTP/1.1\r\n" + BASE + b"\r\n"),
        (
            "a scheduled body",
            "POST",
            CHAT,
            (("x-priority", "high"),),
            b'{"a":1}',
            f"POST {CHAT} HTTP/1.1\r\n".encode() + BASE + b'Content-Length: 7\r\n\r\n{"a":1}',
        ),
    ],
)
async def test_requests(
    name: str, method: str, path: str, fields: Fields, body: bytes | None, forwarded: bytes
) -> None:
    async with (
        raw_upstream((Wait.REQUEST, OK)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        _, stream = await client.request(method, path, fields, body)
        await client.until(lambda: stream.over)
        assert (stream.status, bytes(stream.body), stream.ended) == (200, b"ok", True)
        assert upstream.heard == [forwarded]


@pytest.mark.parametrize(
    ("method", "said", "status", "body"),
    [
        ("GET", answer("X-A: 1", "x-a: 2", "Connection: x-b", "X-B: 1", "Keep-Alive: 5"), 200, b"ok"),
        ("GET", chunked(b"a", b"b", last=b"0\r\nX-Sum: 1\r\n\r\n"), 200, b"ab"),
        ("GET", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK, 200, b"ok"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", 200, b""),
        ("GET", b"HTTP/1.1 204 No\r\n\r\n", 204, b""),
        ("GET", b"HTTP/1.1 304 Not\r\nETag: x\r\n\r\n", 304, b""),
        ("GET", answer(body=b""), 200, b""),
        ("GET", answer(body=b"x" * 500_000, status="404 Not"), 404, b"x" * 500_000),
        ("OPTIONS", answer(status="204 No", body=None), 204, b""),
    ],
)
async def test_answers(method: str, said: bytes, status: int, body: bytes) -> None:
    async with (
        raw_upstream((Wait.REQUEST, said)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        _, stream = await client.request(method, "/v1/models")
        await client.until(lambda: stream.over)
        assert (stream.status, bytes(stream.body), stream.ended, stream.reset) == (status, body, True, None)
        names = [name for name, _ in stream.fields]
        assert not {"connection", "keep-alive", "x-b", "transfer-encoding"} & set(names)
        assert ("x-a" in names) == (b"X-A" in said)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/../x", 400),
        ("/v1/%2e%2e/x", 400),
        ("/v1/m\xf6dels", 400),
        ("/v1/a b", 400),
        ("/v1/a#b", 400),
        ("/v2", 404),
    ],
)
async def test_refused_paths(path: str, status: int) -> None:
    async with raw_upstream() as upstream, running_proxy(upstream.url) as proxy, http2_client(proxy.port) as client:
        _, stream = await client.request("GET", path)
        await client.until(lambda: stream.over)
        assert stream.status == status
        assert b'"invalid_request_error"' in stream.body
        _, probe = await client.request("GET", "/health")
        await client.until(lambda: probe.over)
        assert probe.status == 200
        assert upstream.wires == []
        assert len(proxy.recorder.refused) == 1


@pytest.mark.parametrize("method", ["GET /v1/elsewhere?x=", "GET /admin HTTP/1.1", "G\tT", "G(T", "G:T", ""])
async def test_a_method_that_would_be_two_words_of_http_1_is_refused(method: str) -> None:
    """RFC 9113 section 10.3, RFC 9110 section 9.1: the upstream would read another target than was judged."""
    async with raw_upstream() as upstream, running_proxy(upstream.url) as proxy, http2_client(proxy.port) as client:
        _, stream = await client.request(method, "/v1/files", (), b"abc")
        await client.until(lambda: stream.over)
        assert stream.status == 400
        assert b'"invalid_request_error"' in stream.body
        _, probe = await client.request("GET", "/health")
        await client.until(lambda: probe.over)
        assert probe.status == 200
        assert upstream.wires == []


@pytest.mark.parametrize("path", ["/v1/files", CHAT])
async def test_a_body_that_is_announced_and_does_not_come_is_refused(path: str) -> None:
    """RFC 9113 section 8.1.1: malformed, and not to be forwarded."""
    async with raw_upstream() as upstream, running_proxy(upstream.url) as proxy, http2_client(proxy.port) as client:
        _, stream = await client.request("POST", path, [("content-length", "5")])
        await client.until(lambda: stream.over)
        assert stream.status == 400
        assert upstream.wires == []
        _, probe = await client.request("GET", "/health", [("content-length", "0")])
        await client.until(lambda: probe.over)
        assert probe.status == 200


async def test_no_length_goes_with_a_204() -> None:
    """RFC 9110 section 8.6; nghttp2's clients, curl among them, refuse the whole answer."""
    async with (
        raw_upstream((Wait.REQUEST, b"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n")) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        _, stream = await client.request("GET", "/v1/models")
        await client.until(lambda: stream.over)
        assert (stream.status, stream.reset) == (204, None)
        assert "content-length" not in dict(stream.fields)


BROKEN: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("in a chunk", (chunked(b"half", last=b"9\r\n"), Pause(0.03), End.FIN)),
    ("too few bytes", (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", Pause(0.03), End.RST)),
    ("silent", (chunked(b"half", last=b""), Pause(3))),
)


@pytest.mark.parametrize(("name", "said"), BROKEN, ids=[row[0] for row in BROKEN])
async def test_an_answer_that_breaks_off_resets_its_stream_alone(name: str, said: Script) -> None:
    """RFC 9113 8.1.1: a stream error; the connection's other streams go on."""
    settings = {"upstream": {"idle_timeout": 0.3}}
    async with (
        raw_upstream((Wait.REQUEST, *said), (Wait.REQUEST, Pause(0.6), OK)) as upstream,
        running_proxy(upstream.url, **settings) as proxy,
        http2_client(proxy.port) as client,
    ):
        _, broken = await client.request("POST", CHAT, body=b"{}")
        await client.until(lambda: broken.body)
        _, other = await client.request("POST", CHAT, body=b"{}")
        await client.until(lambda: broken.over and other.over)
        assert (bytes(broken.body), broken.ended) == (b"half", False)
        assert broken.reset == h2.errors.ErrorCodes.INTERNAL_ERROR
        assert (other.status, bytes(other.body), other.ended) == (200, b"ok", True)
        await proxy.settled()
        assert sorted(proxy.recorder.outcomes()) == sorted(
            ["success", "timeout" if name == "silent" else "upstream_error"]
        )


async def test_a_stream_that_is_reset_ends_its_own_call_only() -> None:
    """RFC 9113 5.4.2; contract 4."""
    async with (
        raw_upstream((Wait.REQUEST,), (Wait.REQUEST, Pause(0.3), OK)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        number, gone = await client.request("POST", CHAT, body=b"{}")
        await until(lambda: upstream.wires and upstream.wires[0].received)
        _, other = await client.request("POST", CHAT, body=b"{}")
        client.connection.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        began = trio.current_time()
        await client.flush()
        await until(lambda: upstream.wires[0].ended, 0.25)
        assert trio.current_time() - began < 0.25
        await client.until(lambda: other.over)
        assert other.ended
        assert proxy.recorder.outcomes() == ["cancelled", "success"]
        assert gone.status is None


@pytest.mark.parametrize("way", [End.FIN, End.RST])
async def test_a_connection_that_goes_ends_all_its_calls(way: End) -> None:
    async with (
        raw_upstream((Wait.REQUEST,), (Wait.REQUEST,), (Wait.REQUEST,)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        for _ in range(3):
            await client.request("POST", CHAT, body=b"{}")
        await until(lambda: len(upstream.wires) == 3 and all(wire.received for wire in upstream.wires))
        if way is End.RST:
            client.stream.socket.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")
        client.stream.socket.close()
        await until(lambda: all(wire.ended for wire in upstream.wires), 0.5)
        await proxy.settled()
        await until(lambda: proxy.recorder.outcomes() == ["cancelled"] * 3)


async def _taken(client: Http2Client, port: int) -> None:
    """The connection is alive: another stream is answered."""
    _, probe = await client.request("GET", "/health")
    await client.until(lambda: probe.over)
    assert probe.status == 200


async def test_a_window_that_stays_closed_holds_the_upstream_back_and_is_given_up() -> None:
    """RFC 9113 5.2; contract 3 and 4: bounded buffers, server.client_write_timeout, and only that stream ends."""
    piece = chunked(b"x" * 65536, last=b"").partition(b"\r\n\r\n")[2]
    sent = 0

    async with (
        raw_upstream((Wait.REQUEST, chunked(last=b""))) as upstream,
        running_proxy(upstream.url, server={"client_write_timeout": 0.6}) as proxy,
        http2_client(proxy.port, takes=False) as client,
    ):
        _, stuck = await client.request("POST", CHAT, body=b"{}")
        await client.until(lambda: stuck.status)
        with suppress(trio.BrokenResourceError), trio.fail_after(20):
            while True:
                await upstream.wires[0].stream.send_all(piece)
                sent += len(piece)
        assert sent < 16_000_000, "what kernels hold, and no more"
        await client.until(lambda: stuck.over)
        assert (stuck.reset, len(stuck.body)) == (h2.errors.ErrorCodes.CANCEL, 65535)
        await proxy.settled()
        assert proxy.recorder.outcomes() == ["cancelled"]
        client.connection.increment_flow_control_window(1_000_000)
        await _taken(client, proxy.port)


async def test_a_window_that_is_opened_bit_by_bit_is_progress() -> None:
    async with (
        raw_upstream((Wait.REQUEST, answer(body=b"x" * 200_000))) as upstream,
        running_proxy(upstream.url, server={"client_write_timeout": 0.4}) as proxy,
        http2_client(proxy.port, takes=False) as client,
    ):
        number, slow = await client.request("POST", CHAT, body=b"{}")
        while len(slow.body) < 190_000:
            await trio.sleep(0.1)
            if slow.over:
                break
            client.connection.increment_flow_control_window(20_000)
            client.connection.increment_flow_control_window(20_000, number)
            await client.flush()
        await client.until(lambda: slow.over)
        assert (slow.ended, len(slow.body)) == (True, 200_000)


async def test_an_upload_that_nobody_takes_holds_no_other_stream_up() -> None:
    async with (
        raw_upstream((Deaf(), Pause(30)), (Wait.REQUEST, OK), (Wait.REQUEST, OK)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        number, _ = await client.request("POST", "/v1/files", end=False)
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                room = min(client.connection.local_flow_control_window(number), 16384)
                if room:
                    client.connection.send_data(number, b"x" * room)
                    sent += room
                    await client.flush()
                else:
                    await trio.sleep(0.01)
        assert sent < 32_000_000, "the client is held back"
        _, quick = await client.request("POST", CHAT, body=b'{"a": "%b"}' % (b"y" * 16_000))
        await client.until(lambda: quick.over, 1)
        assert quick.status == 200
        client.connection.reset_stream(number)
        await client.flush()
        await until(lambda: proxy.recorder.passed_through, 3)
        await _taken(client, proxy.port)


async def test_a_stream_that_is_reset_while_it_is_being_sent_takes_no_other_along() -> None:
    """The socket is full when the reset comes, so that sending one stream's piece is under way."""
    length = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    async with (
        raw_upstream((Wait.REQUEST, length % 10 + b"hello"), (Wait.REQUEST, length % 100_000_000)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port, window=1 << 30) as client,
        trio.open_nursery() as nursery,
    ):
        client.connection.increment_flow_control_window(1 << 30)
        _, other = await client.request("GET", "/v1/models")
        await client.until(lambda: other.body)
        number, flooded = await client.request("GET", "/v1/files/1/content")
        await client.until(lambda: flooded.status)
        client.deaf = True

        async def flood() -> None:
            with suppress(trio.BrokenResourceError):
                await upstream.wires[1].stream.send_all(bytes(30_000_000))

        nursery.start_soon(flood)
        await trio.sleep(0.5)
        client.connection.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        await client.flush()
        await trio.sleep(0.1)
        client.deaf = False
        await upstream.wires[0].stream.send_all(b"world")
        await client.until(lambda: other.over)
        assert (bytes(other.body), other.ended) == (b"helloworld", True)


CONNECT: Final = ((":method", "CONNECT"), (":authority", "x"))


@pytest.mark.parametrize("way", ["reset in the same breath", "no room in its window"])
async def test_a_request_that_is_refused_at_once_takes_no_other_stream_along(way: str) -> None:
    is_reset = way.startswith("reset")
    async with (
        raw_upstream((Wait.REQUEST, Pause(0.3), OK)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port, window=65535 if is_reset else 100) as client,
    ):
        _, other = await client.request("GET", "/v1/models")
        await until(lambda: upstream.wires and upstream.wires[0].received)
        number, refused = client.begin_stream(*CONNECT)
        if is_reset:
            client.connection.reset_stream(number)
        await client.flush()
        await client.until(lambda: is_reset or refused.over)
        await client.until(lambda: other.over)
        assert (bytes(other.body), other.ended) == (b"ok", True)
        assert len(proxy.recorder.refused) == 1


async def test_a_refused_web_socket_does_not_keep_its_connection() -> None:
    handshake = {":method": "CONNECT", ":protocol": "websocket", ":scheme": "http", ":path": "/v1/realtime"}
    async with (
        running_proxy("http://127.0.0.1:9/v1", server={"keep_alive_timeout": 0.3}) as proxy,
        http2_client(proxy.port) as client,
    ):
        _, refused = client.begin_stream(*handshake.items(), (":authority", "x"), ("sec-websocket-version", "8"))
        await client.flush()
        await client.until(lambda: refused.over)
        assert json.loads(bytes(refused.body))["error"]["code"] == "invalid_request"
        assert [event.ending.code for event in proxy.recorder.refused] == ["invalid_request"]
        await client.until(lambda: client.closed, 3)
        assert client.closed


@pytest.mark.parametrize("all_together", [False, True], ids=["of one upload", "of all uploads"])
async def test_a_reset_of_an_upload_is_seen_where_no_more_is_read_ahead(
    monkeypatch: pytest.MonkeyPatch, all_together: bool
) -> None:
    """Contract 4: within three seconds."""
    if all_together:
        monkeypatch.setattr("trioproxy.connection.ALL_AHEAD_SIZE_MAX", 0)
    else:
        monkeypatch.setattr("trioproxy.connection.AHEAD_SIZE_MAX", 100_000)
    async with (
        raw_upstream((Deaf(), Pause(30))) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        number, _ = await client.request("POST", "/v1/files", end=False)
        last = trio.current_time()
        while trio.current_time() - last < 2 * UNTAKEN_SECONDS + 0.2:  # until nothing more is taken
            if room := min(client.connection.local_flow_control_window(number), 16384):
                client.connection.send_data(number, b"x" * room)
                await client.flush()
                last = trio.current_time()
            else:
                await trio.sleep(0.01)
        client.connection.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        await client.flush()
        await until(lambda: proxy.recorder.passed_through, 3)
        assert proxy.recorder.passed_through[0].ending.code == "cancelled"
        await _taken(client, proxy.port)


async def test_a_large_upload_is_passed_on_whole() -> None:
    body = bytes(range(256)) * 8000
    async with (
        raw_upstream((Until(b"0\r\n\r\n"), OK)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        number, stream = await client.request("POST", "/v1/files", end=False)
        rest = memoryview(body)
        while rest:
            room = min(client.connection.local_flow_control_window(number), 16384, len(rest))
            if not room:
                await trio.sleep(0.001)
                continue
            client.connection.send_data(number, bytes(rest[:room]))
            rest = rest[room:]
            await client.flush()
        client.connection.end_stream(number)
        await client.flush()
        await client.until(lambda: stream.over)
        assert stream.status == 200
        from wire import dechunk

        sent = dechunk(upstream.heard[0].partition(b"\r\n\r\n")[2])
        assert sent is not None
        assert sent[0] == body


async def test_an_early_answer_ends_the_stream_and_asks_for_no_more_of_the_upload() -> None:
    """RFC 9113 8.1: END_STREAM, then RST_STREAM with NO_ERROR; the connection goes on."""
    async with (
        raw_upstream((Wait.HEAD, answer(body=b"no", status="413 Too"))) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        number, stream = await client.request("POST", "/v1/files", body=b"part", end=False)
        await client.until(lambda: stream.reset is not None)
        assert (stream.status, bytes(stream.body), stream.ended) == (413, b"no", True)
        assert stream.reset == h2.errors.ErrorCodes.NO_ERROR
        assert number == 1
        await _taken(client, proxy.port)


async def test_what_was_for_reset_streams_is_not_kept(upstream: Upstream) -> None:
    """RFC 9113 5.4.2: nothing more is sent on them; whatever the connection's window, nothing is kept for them."""
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer(b"x" * 300_000))
        async with http2_client(proxy.port, window=0, takes=False) as client:
            for _ in range(20):
                number, stream = await client.request("POST", CHAT, body=b"{}")
                await client.until(partial(getattr, stream, "status"))
                client.connection.reset_stream(number)
                await client.flush()
            await until(lambda: len(proxy.recorder.ended) == 20)
            (protocol,) = [each for each in gc.get_objects() if type(each) is Http2 and not each.closed]
            await until(lambda: not protocol.stream_buffers and not protocol._sending)
            _, probe = await client.request("GET", "/health")
            await client.until(lambda: probe.status)
        nursery.cancel_scope.cancel()


async def test_priority_frames_and_pings_hurt_nothing() -> None:
    async with (
        raw_upstream((Wait.REQUEST, OK)) as upstream,
        running_proxy(upstream.url) as proxy,
        http2_client(proxy.port) as client,
    ):
        for number in range(101, 121, 2):
            client.connection.prioritize(number, weight=5, depends_on=0)
        client.connection.ping(b"12345678")
        await client.flush()
        _, stream = await client.request("POST", CHAT, body=b"{}")
        await client.until(lambda: stream.over)
        assert stream.ended


async def test_100_streams_at_once() -> None:
    scripts = [(Wait.REQUEST, answer(body=b"x" * 1000)) * 100 for _ in range(100)]
    async with (
        raw_upstream(*scripts) as upstream,
        running_proxy(upstream.url, scheduler={"concurrency": 100}) as proxy,
        http2_client(proxy.port) as client,
    ):
        streams = [(await client.request("POST", CHAT, body=b"{}"))[1] for _ in range(100)]
        await client.until(lambda: all(stream.over for stream in streams))
        assert [len(stream.body) for stream in streams] == [1000] * 100
        assert proxy.recorder.outcomes() == ["success"] * 100
