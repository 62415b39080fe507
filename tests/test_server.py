"""The proxy on real sockets, as `trioproxy serve` runs it."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from processes import free_port
from support import CHUNKED, LAST_CHUNK, Call, Proxy, Upstream, chunk, running_proxy, until
from trioproxy.events import Ended, Event, Queued, Started
from trioproxy.mailbox import Tasks
from trioproxy.observe import logs
from trioproxy.streams import GuardedStream

FOUR_SLOTS = {"concurrency": 4, "max_queue": 100}
ONE_SLOT = {"concurrency": 1, "max_queue": 100}
CHAT = "/v1/chat/completions"


def post(body: bytes = b"{}", *fields: str, path: str = CHAT) -> bytes:
    """A request's bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: proxy", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


async def read_until_closed(stream: trio.SocketStream) -> bytes:
    """Everything that comes until the connection ends, properly or not."""
    received = b""
    with trio.fail_after(20):
        try:
            async for data in stream:
                received += data
        except trio.BrokenResourceError:
            pass
    return received


async def read_answer(stream: trio.SocketStream) -> tuple[int, bytes]:
    """One answer with a Content-Length."""
    received = b""
    with trio.fail_after(20):
        while b"\r\n\r\n" not in received:
            received += (await stream.receive_some()) or b"<closed>\r\n\r\n"
        head, _, body = received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += await stream.receive_some()
    return int(head.split(b" ")[1]), body


async def queued(proxy: Proxy, count: int) -> None:
    """Wait until so many requests are queued."""
    await until(lambda: len(proxy.app.proxy.scheduler.snapshot().queued) == count)


async def test_never_more_upstream_than_there_are_slots(upstream: Upstream) -> None:
    busy = peak = 0

    async def answer(call: Call) -> None:
        nonlocal busy, peak
        busy += 1
        peak = max(peak, busy)
        await trio.sleep(0.01)
        busy -= 1
        await call.answer()

    async with running_proxy(upstream.url, scheduler=FOUR_SLOTS) as proxy, trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(proxy.client.post, CHAT)
        for _ in range(40):
            nursery.start_soon(answer, await upstream.call())
    assert peak == 4
    assert upstream.connections == 4
    assert proxy.recorder.outcomes() == ["success"] * 40
    proxy.assert_settled()


async def test_24_requests_of_random_priority_arrive_upstream_in_exact_order(upstream: Upstream) -> None:
    chance = random.Random(7)
    async with running_proxy(upstream.url, scheduler=ONE_SLOT) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(proxy.client.post, CHAT)
        blocker = await upstream.call()
        sent = [(chance.randrange(101), number) for number in range(24)]
        for count, (priority, number) in enumerate(sent, 1):
            body = json.dumps({"number": number, "priority": priority})
            nursery.start_soon(partial(proxy.client.post, CHAT, content=body))
            await queued(proxy, count)
        await blocker.answer()
        arrived = []
        for _ in sent:
            call = await upstream.call()
            arrived.append(json.loads(call.body)["number"])
            await call.answer()
    expected = sorted(sent, key=lambda request: (-request[0], request[1]))
    assert arrived == [number for _, number in expected]


async def test_the_youngest_of_the_lowest_is_evicted_and_an_equal_rejected(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, scheduler={"concurrency": 1, "max_queue": 2}) as proxy:
        answers: dict[str, httpx.Response] = {}

        async def send(name: str, priority: str) -> None:
            answers[name] = await proxy.client.post(CHAT, json={"name": name}, headers={"X-Priority": priority})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, "running", "low")
            running = await upstream.call()
            nursery.start_soon(send, "old", "low")
            await queued(proxy, 1)
            nursery.start_soon(send, "young", "low")
            await queued(proxy, 2)
            await send("equal", "low")
            assert answers["equal"].status_code == 503
            assert answers["equal"].json()["error"]["code"] == "queue_full"
            nursery.start_soon(send, "urgent", "high")
            await until(lambda: "young" in answers)
            assert answers["young"].status_code == 503
            assert answers["young"].json()["error"]["code"] == "evicted"
            await running.answer()
            for expected in ("urgent", "old"):
                call = await upstream.call()
                assert json.loads(call.body)["name"] == expected
                await call.answer()
        assert {name: answer.status_code for name, answer in answers.items() if answer.status_code == 200}.keys() == {
            "running",
            "old",
            "urgent",
        }
        proxy.assert_settled()


@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_the_queue_never_reaches_the_upstream(upstream: Upstream, way: str) -> None:
    async with running_proxy(upstream.url, scheduler=ONE_SLOT) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(proxy.client.post, CHAT)
        blocker = await upstream.call()
        stream = await proxy.connect()
        await stream.send_all(post(b'{"leaves": 1}'))
        await queued(proxy, 1)
        await leave(stream, way)
        await queued(proxy, 0)
        await blocker.answer()
        await trio.sleep(0.05)
        assert len(upstream.calls) == 1
        assert sorted(proxy.recorder.outcomes()) == ["cancelled", "success"]


async def test_a_client_that_leaves_in_the_moment_in_which_it_gets_a_slot_never_reaches_the_upstream(
    upstream: Upstream,
) -> None:
    running: set[GuardedStream] = set()

    def leave_at_once(event: Event) -> None:
        if isinstance(event, Started) and event.was_queued:
            for stream in proxy.server._streams - running:
                stream.leave()

    async with running_proxy(upstream.url, (leave_at_once,), scheduler=ONE_SLOT) as proxy:
        first, second = await proxy.connect(), await proxy.connect()
        await first.send_all(post())
        blocker = await upstream.call()
        running |= {stream for stream in proxy.server._streams if stream._exchanges}
        await second.send_all(post())
        await queued(proxy, 1)
        await blocker.answer()  # on a connection that is kept, and on which the second one's request could go at once
        await until(lambda: len(proxy.recorder.ended) == 2)
        assert proxy.recorder.outcomes() == ["success", "cancelled"]
        await trio.sleep(0.05)
        assert len(upstream.calls) == 1


async def test_who_does_not_read_at_its_deadline_is_cut_off_by_http_1_0_too(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        head, _, body = post(b"{}", "X-Request-Timeout: 0.3").partition(b"\r\n\r\n")
        await stream.send_all(head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n\r\n" + body)
        await pump(await upstream.call())
        await proxy.settled()
        assert proxy.recorder.outcomes() == ["timeout"]
    assert "Error in ASGI" not in caplog.text


async def leave(stream: trio.SocketStream, way: str) -> None:
    """Go away in one of the ways in which clients go away."""
    if way == "half-close":
        await stream.send_eof()
        return
    if way == "reset":
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()


@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
@pytest.mark.parametrize("said", [b"", CHUNKED + chunk(b"data: 1\n\n")])
async def test_a_client_that_leaves_while_running_closes_the_upstream(
    upstream: Upstream, way: str, said: bytes
) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post())
        call = await upstream.call()
        await call.send(said)
        await trio.sleep(0.05)
        await leave(stream, way)
        with trio.fail_after(1):  # at once: test_relay says so by a clock that does not depend on the machine
            await call.gone.wait()
        await proxy.settled()
        assert proxy.recorder.outcomes() == ["cancelled"]


@pytest.mark.parametrize("way", ["close", "half-close"])
@pytest.mark.parametrize(
    "data", [post(), b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["scheduled", "passed through"]
)
async def test_a_client_that_leaves_right_behind_its_request(
    upstream: Upstream, way: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What would end the call later is not to be what ends it.
    monkeypatch.setattr("trioproxy.streams.CLOSING_SECONDS", 60)
    monkeypatch.setattr("trioproxy.streams.LOOK_SECONDS", 60)
    monkeypatch.setattr("trioproxy.connection.UNTAKEN_SECONDS", 60)
    async with running_proxy(upstream.url) as proxy:

        def endings() -> list[str]:
            recorder = proxy.recorder
            return [event.ending.code for kind in (recorder.ended, recorder.passed_through) for event in kind]

        for count in range(1, 21):  # its leaving is read before the request's task has had its first turn, or after
            stream = await proxy.connect()
            os.write(stream.socket.fileno(), data)
            await leave(stream, way)
            await until(lambda count=count: len(endings()) == count)  # type: ignore[misc]
        assert endings() == ["cancelled"] * 20
        with trio.fail_after(20):
            for call in upstream.calls:
                await call.gone.wait()
        await proxy.settled()


async def test_a_pipelined_second_request_does_not_hide_that_the_client_has_left(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post() + post())
        call = await upstream.call()
        await trio.sleep(0.1)
        await stream.aclose()
        with trio.fail_after(3):
            await call.gone.wait()
        await proxy.settled()
        assert proxy.recorder.outcomes() == ["cancelled"]
        assert len(upstream.calls) == 1


@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_in_the_middle_of_an_upload(upstream: Upstream, way: str) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nnot all")
        await trio.sleep(0.05)
        await leave(stream, way)
        await until(lambda: proxy.recorder.passed_through, 0.5)
        assert proxy.recorder.passed_through[0].ending.code == "cancelled"


async def test_a_client_that_leaves_during_an_upload_that_nobody_takes() -> None:
    async with deaf_server() as url, running_proxy(url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        with trio.move_on_after(0.5):
            while True:
                await stream.send_all(b"x" * 65536)
        await leave(stream, "reset")  # a FIN would wait behind what the proxy does not read
        await until(lambda: proxy.recorder.passed_through, 3)
        assert proxy.recorder.passed_through[0].ending.code == "cancelled"


@asynccontextmanager
async def deaf_server() -> AsyncIterator[str]:
    """Accepts connections and reads nothing."""
    with trio.socket.socket() as listening:
        await listening.bind(("127.0.0.1", 0))
        listening.listen(10)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


async def pump(call: Call) -> int:
    """Stream without end; how much was taken before the proxy went away."""
    sent = 0
    piece = chunk(b"x" * 65536)
    try:
        await call.send(CHUNKED)
        while True:
            await call.send(piece)
            sent += len(piece)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return sent


async def test_a_client_that_stops_reading_loses_its_slot(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, server={"client_write_timeout": 0.5}) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post())
        call = await upstream.call()
        with trio.fail_after(20):
            sent = await pump(call)
        # What the kernels' socket buffers on both connections hold, and no spooling beyond.
        assert sent < 32 * 1024 * 1024
        await proxy.settled()
        assert proxy.recorder.outcomes() == ["cancelled"]
        await stream.aclose()


async def test_a_slow_reader_keeps_its_slot(upstream: Upstream) -> None:
    size = 16_000_000
    async with running_proxy(upstream.url, server={"client_write_timeout": 0.4}) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post())
        call = await upstream.call()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.answer, b"x" * size)
            received = 0
            began = trio.current_time()
            while received < size:
                await trio.sleep(0.05)
                received += len(await stream.receive_some(1_000_000))
        assert trio.current_time() - began > 2 * 0.4
        assert proxy.recorder.outcomes() == ["success"]


@pytest.mark.parametrize(
    "said",
    [
        CHUNKED + chunk(b"data: 1\n\n"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf",
    ],
)
async def test_an_upstream_that_dies_mid_answer_never_looks_whole(upstream: Upstream, said: bytes) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(httpx.RemoteProtocolError):
                await proxy.client.post(CHAT)

        nursery.start_soon(send)
        call = await upstream.call()
        await call.send(said)
        await trio.sleep(0.02)
        await call.close()
    assert proxy.recorder.outcomes() == ["upstream_error"]


async def test_to_http_1_0_a_broken_answer_ends_with_a_reset(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(b"POST /v1/embeddings HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        call = await upstream.call()
        await call.send(CHUNKED + chunk(b"part of it"))
        received = b""
        with trio.fail_after(2):
            while b"part of it" not in received:
                received += await stream.receive_some()
            await call.close()
            with pytest.raises(trio.BrokenResourceError):
                assert await stream.receive_some() != b""


@pytest.mark.parametrize("way", ["the end of the grace", "the write timeout"])
async def test_to_http_1_0_being_cut_off_is_a_reset_too(upstream: Upstream, way: str) -> None:
    settings: dict[str, dict[str, Any]] = {"server": {"shutdown_grace": 0.2, "client_write_timeout": 0.4}}
    async with running_proxy(upstream.url, **settings) as proxy:
        stream = await proxy.connect()
        await stream.send_all(b"POST /v1/embeddings HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        call = await upstream.call()
        await call.send(CHUNKED + chunk(b"part of it"))
        if way == "the write timeout":
            await pump(call)
        else:
            proxy.server.shut_down()
        await until(lambda: proxy.recorder.ended)

        async def read_on() -> None:
            while await stream.receive_some() != b"":
                pass

        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
            await read_on()


@pytest.mark.parametrize("limit", ["deadline", "request_timeout"])
async def test_a_time_limit_that_passes_while_the_upstream_works_is_told(upstream: Upstream, limit: str) -> None:
    settings = {"request_timeout": 0.2} if limit == "request_timeout" else {}
    fields = {"X-Request-Timeout": "0.2"} if limit == "deadline" else {}
    async with running_proxy(upstream.url, upstream=settings) as proxy:
        answer = await proxy.client.post(CHAT, headers=fields)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == ("deadline_exceeded" if fields else "upstream_timeout")


async def test_a_deadline_that_passes_in_the_moment_in_which_the_answer_begins(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post(b"{}", "X-Request-Timeout: 1"))
        call = await upstream.call()
        assert isinstance(call.stream, trio.SocketStream)
        os.write(call.stream.socket.fileno(), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        time.sleep(1)  # noqa: ASYNC251 - the answer and the deadline are to come in the same turn of the loop
        status, body = await read_answer(stream)
        assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
        await proxy.settled()


async def test_a_deadline_ends_a_write_to_a_client_that_does_not_read(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post(b"{}", "X-Request-Timeout: 0.5"))
        call = await upstream.call()
        with trio.fail_after(20):
            await pump(call)
        await proxy.settled()
        (ended,) = proxy.recorder.ended
        assert ended.ending.code == "deadline_exceeded"
        assert ended.total_seconds < 2


async def test_connection_close_is_honoured_and_keep_alive_works(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, server={"keep_alive_timeout": 0.3}) as proxy:
        stream = await proxy.connect()
        for _ in range(2):
            await stream.send_all(post())
            await (await upstream.call()).answer(b"{}")
            assert await read_answer(stream) == (200, b"{}")
        began = trio.current_time()
        assert await read_until_closed(stream) == b""
        assert 0.2 < trio.current_time() - began < 1

        stream = await proxy.connect()
        await stream.send_all(post(b"{}", "Connection: close"))
        await (await upstream.call()).answer(b"{}")
        with trio.fail_after(1):
            received = await read_until_closed(stream)
        assert received.endswith(b"{}")


async def test_a_connection_that_says_nothing_is_closed(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, server={"keep_alive_timeout": 0.3}) as proxy:
        for said in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            stream = await proxy.connect()
            await stream.send_all(said)
            with trio.fail_after(3):
                await read_until_closed(stream)


@pytest.mark.parametrize("version", ["1.1", "1.1 by h11", "2"])
async def test_what_has_been_read_is_not_idle(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The look for idle connections comes between a request's reading and the first step of what serves it."""
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer(b"{}"))
        spawn_app = Tasks.spawn_app

        async def spawn_and_look(self: Tasks, *arguments: Any) -> Any:
            put = await spawn_app(self, *arguments)
            proxy.server._activity._end_idle(math.inf)
            return put

        monkeypatch.setattr(Tasks, "spawn_app", spawn_and_look)
        headers = {"Connection": "keep-alive, x"} if version == "1.1 by h11" else {}
        http2 = version == "2"
        async with httpx.AsyncClient(base_url=proxy.url, http1=not http2, http2=http2, trust_env=False) as client:
            for _ in range(3):
                answer = await client.post(CHAT, headers=headers)
                assert (answer.status_code, answer.content) == (200, b"{}")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("field", ["X: y", "Connection: close"])
async def test_an_upload_that_breaks_off_is_refused_and_nothing_fails(
    upstream: Upstream, capfd: pytest.CaptureFixture[str], field: str
) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post(b"x" * 100, field)[:-50])
        await trio.sleep(0.05)
        await stream.send_eof()
        assert b"HTTP/1.1 400" in await read_until_closed(stream)
        await until(lambda: proxy.recorder.refused)
        assert (await proxy.client.get("/health")).status_code == 200
    assert "a connection failed" not in capfd.readouterr().out
    assert upstream.calls == []


async def test_behind_an_upload_comes_another_request(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        upload = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
        await stream.send_all(upload + post(b"{}", "Expect: 100-continue").removesuffix(b"{}"))
        await (await upstream.call()).answer(b"uploaded")
        received = b""
        with trio.fail_after(20):
            while b"HTTP/1.1 100" not in received:
                received += await stream.receive_some()
        assert b"uploaded" in received
        await stream.send_all(b"{}")
        await (await upstream.call()).answer(b"answered")
        assert await read_answer(stream) == (200, b"answered")

        await stream.send_all(upload + b"garbage\r\n\r\n")
        await (await upstream.call()).answer(b"uploaded")
        received = await read_until_closed(stream)
        assert b"HTTP/1.1 400" in received
        assert [refused.ending.code for refused in proxy.recorder.refused] == ["invalid_request"]


async def test_a_body_one_byte_too_large_is_refused_and_the_connection_survives(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, server={"max_body_size": 1000}) as proxy:
        stream = await proxy.connect()
        await stream.send_all(post(b"x" * 1001))
        status, body = await read_answer(stream)
        assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
        await stream.send_all(post(b"x" * 1000))
        await (await upstream.call()).answer()
        assert await read_answer(stream) == (200, b"{}")


async def test_a_much_too_large_body_is_refused_while_it_is_being_sent(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, server={"max_body_size": 1000}) as proxy:
        answer = await proxy.client.post(CHAT, content=b"x" * 20_000_000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(300):
                yield b"x" * 65536

        answer = await proxy.client.post(CHAT, content=pieces())
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_an_upload_is_passed_on_while_it_arrives(upstream: Upstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(50):
            yield b"%d," % number

    expected = b"".join([b"%d," % number for number in range(50)])
    async with running_proxy(upstream.url, server={"max_body_size": 10}) as proxy, trio.open_nursery() as nursery:
        for content in (pieces(), expected):
            nursery.start_soon(partial(proxy.client.post, "/v1/files", content=content))
            call = await upstream.call()
            assert call.body == expected
            assert (call.header("transfer-encoding") is None) == isinstance(content, bytes)
            await call.answer()


async def test_every_method_and_odd_paths_go_through(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        for line in (
            b"PROPFIND /v1/files/%7Ea%2Fb?x=%20y&z HTTP/1.1",
            b"OPTIONS /v1/models HTTP/1.1",
            b"DELETE /v1//files//a HTTP/1.1",
            b"GET http://elsewhere/v1/models?limit=3 HTTP/1.1",
            b"GET /v1 HTTP/1.1",
            b"GET /v1/ HTTP/1.1",
        ):
            stream = await proxy.connect()
            await stream.send_all(line + b"\r\nHost: elsewhere\r\n\r\n")
            call = await upstream.call()
            method, target, _ = line.decode().split(" ")
            assert (call.method, call.target) == (method, target.removeprefix("http://elsewhere"))
            assert call.header("host") == upstream.url.removeprefix("http://").removesuffix("/v1")
            await call.answer()
            assert (await read_answer(stream))[0] == 200
            await stream.aclose()


async def test_answers_without_a_body(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        answers: list[httpx.Response] = []

        async def send(method: str) -> None:
            answers.append(await proxy.client.request(method, "/v1/models/x"))

        for method, said in [
            ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"),
            ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n"),
            ("GET", b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\n\r\n'),
            ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        ]:
            nursery.start_soon(send, method)
            await (await upstream.call()).send(said)
            await until(lambda: answers)
            answer = answers.pop()
            assert str(answer.status_code).encode() in said
            assert answer.content == b""
            if method == "HEAD":
                assert answer.headers["content-length"] == "1234"
        assert upstream.connections == 1


async def test_both_framings_from_the_upstream_become_one(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        answers: list[httpx.Response] = []

        async def send() -> None:
            answers.append(await proxy.client.post(CHAT))

        nursery.start_soon(send)
        framing = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
        await (await upstream.call()).send(framing + chunk(b"whole") + LAST_CHUNK)
        await until(lambda: answers)
        assert answers[0].content == b"whole"


@pytest.mark.parametrize(
    ("request_line", "fields"),
    [
        (b"POST /v1/chat/completions#x HTTP/1.1", b""),
        (b"CONNECT /v1/models HTTP/1.1", b""),
        (b"POST /v1/chat/completions HTTP/1.1", b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n"),
    ],
)
async def test_what_can_be_read_in_two_ways_is_refused(upstream: Upstream, request_line: bytes, fields: bytes) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(request_line + b"\r\nHost: x\r\n" + fields + b"\r\n")
        with trio.fail_after(20):
            status, body = await read_answer(stream)
            assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request")
            if fields:
                assert await read_until_closed(stream) == b""
        assert upstream.calls == []


async def test_headers_go_through_both_ways_but_for_those_of_the_connection(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(
            post(b"{}", "X-A: 1", "x-a: 2", "Connection: keep-alive, X-Hop", "X-Hop: 1", "TE: trailers", "Expect: x")
        )
        call = await upstream.call()
        assert [(name, value) for name, value in call.headers if name.lower() == "x-a"] == [("X-A", "1"), ("x-a", "2")]
        assert not {"connection", "x-hop", "te", "expect", "x-priority"} & {name.lower() for name, _ in call.headers}
        await call.send(
            b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nConnection: X-Drop\r\nX-Drop: 1\r\n"
            b"Keep-Alive: timeout=5\r\nDate: then\r\nServer: theirs\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST_CHUNK
        )
        with trio.fail_after(2):
            head = b""
            while b"0\r\n\r\n" not in head:
                head += await stream.receive_some()
        fields = head.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
        assert fields[:4] == [b"Set-Cookie: a=1", b"set-cookie: b=2", b"Date: then", b"Server: theirs"]
        assert not any(field.lower().startswith((b"x-drop", b"keep-alive")) for field in fields)
        await stream.aclose()


async def test_one_connections_failure_does_not_end_the_process(
    upstream: Upstream, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running_proxy(upstream.url) as proxy:
        stream = await proxy.connect()
        await stream.send_all(
            b"GET /realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        with trio.fail_after(2):
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 404")
        assert "Exception" not in capfd.readouterr().err
        await stream.send_all(b"\x81\x85\x00\x00\x00\x00hello")
        await trio.sleep(0.1)
        await stream.aclose()
        for nonsense in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense" * 10):
            stream = await proxy.connect()
            await stream.send_all(nonsense)
            await trio.sleep(0.02)
            await stream.aclose()
        assert (await proxy.client.get("/health")).json()["status"] == "ok"


async def test_probes_and_metrics(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        assert (await proxy.client.get("/ready")).status_code == 200
        text = await proxy.client.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        assert 'openai_proxy_available_permits{pool="default"} 10.0' in text.text
        openmetrics = await proxy.client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        assert openmetrics.text.endswith("# EOF\n")
        for path in ("/", "/nope", "/v2/models", "/v1x", "/metrics/"):
            missing = await proxy.client.get(path)
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        assert (await proxy.client.post("/health")).status_code == 404
        for path in ("/health", "/ready", "/metrics"):
            options = await proxy.client.options(path)
            assert (options.status_code, options.json()["error"]["code"]) == (404, "not_found")
            answer = await proxy.client.head(path, headers={"X-Request-Id": "mine"})
            assert answer.status_code == 200
            assert answer.headers["x-request-id"] == answer.headers["x-trioproxy-request-id"] == "mine"


async def test_messages_say_it_in_words_and_not_in_pythons() -> None:
    async with running_proxy(f"http://127.0.0.1:{free_port()}/v1") as proxy:
        refused = (await proxy.client.get("/v1/models")).json()["error"]["message"]
        assert refused.endswith("/v1: Connection refused.")
        stream = await proxy.connect()
        await stream.send_all(b"nonsense\r\n\r\n")
        answer = b""
        with trio.fail_after(20):
            while b"}}" not in answer:
                answer += await stream.receive_some()
        assert b"The request cannot be read: illegal request line." in answer


@pytest.mark.parametrize(
    "sent",
    [
        post(b"{}") + b'"prompt": "it\'s SECRET"}\r\n\r\n',  # its Content-Length is wrong
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nSECRET\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer SECRET\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization\xff: Bearer 'SECRET\"\r\n\r\n",
        b"Authorization: Bearer SECRET\r\n\r\n",
    ],
    ids=["a body's rest", "a chunk", "a blank before the colon", "an odd name", "no request"],
)
async def test_what_cannot_be_read_is_not_quoted_in_the_log(upstream: Upstream, sent: bytes) -> None:
    out = StringIO()
    writer = logs.configure("debug", "json", None, out)
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, Call.answer)
        stream = await proxy.connect()
        await stream.send_all(sent)
        answer = await read_until_closed(stream)
        assert b'"code":"invalid_request"' in answer
        assert b"SECRET" not in answer
        nursery.cancel_scope.cancel()
    writer.close()
    assert "request refused" in out.getvalue()
    assert "SECRET" not in out.getvalue()


async def test_shutting_down_finishes_running_and_queued_work(upstream: Upstream) -> None:
    settings: dict[str, dict[str, Any]] = {"server": {"shutdown_grace": 5}, "scheduler": ONE_SLOT}
    async with running_proxy(upstream.url, **settings) as proxy:
        answers: list[int] = []

        async def send() -> None:
            answers.append((await proxy.client.post(CHAT)).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            running = await upstream.call()
            nursery.start_soon(send)
            await queued(proxy, 1)
            proxy.server.shut_down()
            await trio.sleep(0.05)
            ready = await proxy.client.get("/ready")
            assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
            assert (await proxy.client.get("/health")).status_code == 200
            refused = await proxy.client.post(CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["x-should-retry"] == "true"
            await running.answer()
            await (await upstream.call()).answer()
        assert answers == [200, 200]
        assert proxy.recorder.outcomes() == ["rejected", "success", "success"]


async def test_the_grace_is_over_and_a_client_has_stopped_reading(upstream: Upstream) -> None:
    began = 0.0
    settings: dict[str, dict[str, Any]] = {"server": {"shutdown_grace": 0.3}, "scheduler": ONE_SLOT}
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            async with running_proxy(upstream.url, **settings) as proxy:
                stopped = await proxy.connect()
                await stopped.send_all(post())
                nursery.start_soon(pump, await upstream.call())
                waiting = await proxy.connect()
                await waiting.send_all(post())
                await queued(proxy, 1)
                await trio.sleep(0.3)
                proxy.server.shut_down()
                began = trio.current_time()
                assert await read_until_closed(waiting) == b""
                assert 0.2 < trio.current_time() - began < 1
            await stopped.aclose()
    assert proxy.recorder.outcomes() == ["cancelled", "cancelled"]
    proxy.assert_settled()


async def test_an_upstream_that_cannot_be_reached(upstream: Upstream) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with running_proxy(f"http://127.0.0.1:{port}/v1") as proxy:
            answer = await proxy.client.post(CHAT)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
            assert "refused" in answer.json()["error"]["message"].lower()
    async with running_proxy("http://no-such-host.invalid/v1") as proxy:
        answer = await proxy.client.post(CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")


async def test_an_upstream_key_replaces_the_clients_credentials(upstream: Upstream) -> None:
    async with running_proxy(upstream.url, upstream={"api_key": "secret"}) as proxy, trio.open_nursery() as nursery:
        fields = {"Authorization": "Bearer theirs", "OpenAI-Organization": "org", "OpenAI-Project": "p"}
        nursery.start_soon(lambda: proxy.client.post(CHAT, headers=fields))
        call = await upstream.call()
        assert call.header("authorization") == "Bearer secret"
        assert call.header("openai-organization") is None
        assert call.header("openai-project") is None
        await call.answer()


async def test_a_connection_that_the_upstream_has_closed_is_not_used_again(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(proxy.client.post, CHAT)
                call = await upstream.call()
                await call.answer()
            await call.close()
            await trio.sleep(0.02)
    assert proxy.recorder.outcomes() == ["success"] * 3
    assert upstream.connections == 3


async def test_the_account_balances_after_300_mixed_requests(upstream: Upstream, tmp_path: Path) -> None:
    chance = random.Random(11)
    writer = logs.configure("info", "json", tmp_path / "proxy.log", StringIO())

    async def answer(call: Call) -> None:
        await trio.sleep(chance.uniform(0, 0.01))
        try:
            match json.loads(call.body)["kind"]:
                case "whole":
                    await call.answer()
                case "impatient":
                    await call.gone.wait()
                case "failing":
                    await call.answer(b"{}", 500)
                case "broken":
                    await call.send(CHUNKED + chunk(b"x"))
                    await call.close()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def send(proxy: Proxy, kind: str) -> None:
        await trio.sleep(chance.uniform(0, 0.5))
        body = {"kind": kind, "priority": chance.randrange(101)}
        if kind == "impatient":
            stream = await proxy.connect()
            await stream.send_all(post(json.dumps(body).encode()))
            await trio.sleep(chance.uniform(0.01, 0.2))
            await stream.aclose()
            return
        with suppress(httpx.RemoteProtocolError):
            await proxy.client.post(CHAT, json=body, timeout=60)

    async with running_proxy(upstream.url, scheduler={"concurrency": 4, "max_queue": 20}) as proxy:
        async with trio.open_nursery() as answering:

            async def serve() -> None:
                while True:
                    answering.start_soon(answer, await upstream.call())

            answering.start_soon(serve)
            answering.start_soon(keep_checking, proxy)
            async with trio.open_nursery() as sending:
                for _ in range(300):
                    kind = chance.choice(["whole", "whole", "failing", "broken", "impatient"])
                    sending.start_soon(send, proxy, kind)
            await proxy.settled()
            answering.cancel_scope.cancel()
        ended = len(proxy.recorder.ended)
        assert await totals(proxy) == (ended, ended)
        assert ended == 300
        assert upstream.open_connections == proxy.app.proxy.upstream.idle
        assert len({event.request.request_id for event in proxy.recorder.ended}) == ended
        assert {"success", "upstream_error", "cancelled"} <= set(proxy.recorder.outcomes())
        proxy.assert_settled()
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "proxy.log").read_text().splitlines()]
    logged = Counter(line["outcome"] for line in lines if "outcome" in line)
    assert logged == Counter(proxy.recorder.outcomes())
    assert len({line["request_id"] for line in lines if "outcome" in line}) == ended


async def totals(proxy: Proxy) -> tuple[float, float]:
    """The sums of the two counters of ended requests, as a scraper sees them."""
    text = (await proxy.client.get("/metrics")).text
    statuses, outcomes = (
        sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))
        for name in ("openai_proxy_requests_total", "openai_proxy_requests_outcome_total")
    )
    return statuses, outcomes


async def keep_checking(proxy: Proxy) -> None:
    """Every few milliseconds: both counters agree, and everything received is ended, queued or started."""
    while True:
        statuses, outcomes = await totals(proxy)
        assert statuses == outcomes
        received = {event.request for event in proxy.recorder.events if isinstance(event, Queued | Started | Ended)}
        snapshot = proxy.app.proxy.scheduler.snapshot()
        assert len(received) == len(proxy.recorder.ended) + len(snapshot.queued) + len(snapshot.running)
        assert len(snapshot.running) <= snapshot.permits
        proxy.app.proxy.check_invariants()
        await trio.sleep(0.01)


async def test_a_small_answer_leaves_in_one_write(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and body have come together, and go together."""
    writes: list[bytes] = []
    send_all = GuardedStream.send_all

    async def counting(stream: GuardedStream, data: bytes) -> None:
        writes.append(bytes(data))
        await send_all(stream, data)

    monkeypatch.setattr(GuardedStream, "send_all", counting)
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer(b"whole"))
        post, get = proxy.client.post, proxy.client.get
        for send in (post(CHAT, content=b"{}"), get("/v1/models"), get("/health")):
            assert (await send).status_code == 200
            assert len(writes) == 1
            writes.clear()
        nursery.cancel_scope.cancel()
