"""HTTP/2 clients, without TLS by prior knowledge."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import httpx
import pytest
import trio

from support import CHUNKED, LAST_CHUNK, Upstream, chunk, running_proxy, until

CHAT = "/v1/chat/completions"


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, http1=False, http2=True, trust_env=False, timeout=10)


async def test_requests_share_a_connection_and_their_answers_are_whole(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy, client_of(proxy.url) as client, trio.open_nursery() as nursery:
        answers: list[httpx.Response] = []

        async def send(number: int) -> None:
            answers.append(await client.post(CHAT, json={"number": number, "priority": "high"}))

        for number in range(5):
            nursery.start_soon(send, number)
        for _ in range(5):
            call = await upstream.call()
            assert call.header("transfer-encoding") is None
            await call.send(CHUNKED + chunk(call.body) + LAST_CHUNK)
        await until(lambda: len(answers) == 5)
        assert {answer.http_version for answer in answers} == {"HTTP/2"}
        assert sorted(answer.json()["number"] for answer in answers) == list(range(5))
        assert [event.request.priority for event in proxy.recorder.ended] == [70] * 5


async def test_an_upstream_that_dies_mid_answer_never_looks_whole_nor_hangs(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy, client_of(proxy.url) as client, trio.open_nursery() as nursery:

        async def send() -> None:
            with trio.fail_after(2), pytest.raises(httpx.TransportError):
                await client.post(CHAT)

        nursery.start_soon(send)
        call = await upstream.call()
        await call.send(CHUNKED + chunk(b"data: 1\n\n"))
        await trio.sleep(0.05)
        await call.close()
    assert proxy.recorder.outcomes() == ["upstream_error"]


async def test_a_body_is_announced_upstream_only_if_there_is_one(upstream: Upstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one, "
        yield b"two"

    async with running_proxy(upstream.url) as proxy, client_of(proxy.url) as client, trio.open_nursery() as nursery:
        for method, content, body in (("DELETE", None, b""), ("POST", pieces(), b"one, two"), ("GET", None, b"")):
            nursery.start_soon(partial(client.request, method, "/v1/files", content=content))
            call = await upstream.call()
            assert (call.method, call.body) == (method, body)
            assert (call.header("transfer-encoding") == "chunked") == bool(body)
            await call.answer()


async def test_a_client_that_leaves_closes_the_upstream(upstream: Upstream) -> None:
    async with running_proxy(upstream.url) as proxy, client_of(proxy.url) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.post, CHAT)
        call = await upstream.call()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(2):
            await client.aclose()
            await call.gone.wait()
            await proxy.settled()
    assert proxy.recorder.outcomes() == ["cancelled"]
