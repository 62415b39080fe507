"""The HTTP/1.1 client behind httpx's transport interface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from authority import Authority
from support import CHUNKED, LAST_CHUNK, Upstream, chunk, running_upstream
from trioproxy.http1_transport import Transport

TIMEOUT = httpx.Timeout(5, read=0.2, connect=0.2)


@asynccontextmanager
async def client_of(upstream: Upstream, transport: Transport | None = None) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=upstream.url, transport=transport or Transport(), timeout=TIMEOUT) as client:
        yield client


async def test_requests_one_after_another_share_a_connection(upstream: Upstream) -> None:
    async with client_of(upstream) as client, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer(call.body))
        for body in (b"", b"small", b"x" * 1_000_000):
            answer = await client.post("/a?b=%20", content=body, headers={"X-A": "b"})
            assert (answer.status_code, answer.content) == (200, body)
        nursery.cancel_scope.cancel()
    assert upstream.connections == 1
    assert upstream.calls[0].target == "/v1/a?b=%20"
    assert upstream.calls[0].header("x-a") == "b"


async def test_bodies_stream_both_ways(upstream: Upstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"de"

    async with client_of(upstream) as client, trio.open_nursery() as nursery:

        async def answer() -> None:
            call = await upstream.call()
            assert call.header("transfer-encoding") == "chunked"
            await call.send(CHUNKED + chunk(b"data: 1\n\n"))
            await trio.sleep(0.05)
            await call.send(chunk(b"data: 2\n\n") + LAST_CHUNK)

        nursery.start_soon(answer)
        async with client.stream("POST", "/", content=pieces()) as response:
            assert [piece async for piece in response.aiter_raw()] == [b"data: 1\n\n", b"data: 2\n\n"]


async def test_an_answer_that_is_not_read_costs_its_connection(upstream: Upstream) -> None:
    async with client_of(upstream) as client, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.send(CHUNKED + chunk(b"x")))
        async with client.stream("GET", "/"):
            pass
        with trio.fail_after(1):
            await upstream.calls[0].gone.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", httpx.RemoteProtocolError),
        (CHUNKED + b"zz\r\n", httpx.RemoteProtocolError),
        (b"nonsense\r\n\r\n", httpx.RemoteProtocolError),
        (b"", httpx.RemoteProtocolError),
    ],
)
async def test_what_goes_wrong_is_told_as_httpx_does(
    upstream: Upstream, said: bytes, error: type[httpx.TransportError]
) -> None:
    async with client_of(upstream) as client, trio.open_nursery() as nursery:

        async def answer() -> None:
            call = await upstream.call()
            await call.send(said)
            await call.close()

        nursery.start_soon(answer)
        with pytest.raises(error):
            await client.get("/")


async def test_timeouts(upstream: Upstream) -> None:
    async with client_of(upstream) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/")
        await (await upstream.call()).gone.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upstream.behave, lambda call: call.send(CHUNKED + chunk(b"x")))
            with pytest.raises(httpx.ReadTimeout):
                await client.get("/")
            nursery.cancel_scope.cancel()
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:9/")


async def test_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with running_upstream(authority.serving()) as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer(b"x" * 100_000))
        async with client_of(upstream, Transport(authority.trusting())) as client:
            for _ in range(2):
                assert (await client.get("/")).content == b"x" * 100_000
        assert upstream.connections == 1
        nursery.cancel_scope.cancel()
