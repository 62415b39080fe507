"""The traps of this stack that are not covered by the story of a request: each fails without its remedy."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import httpx
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from werkzeug.exceptions import MethodNotAllowed, NotFound

from memory import House
from support import CHUNKED, LAST_CHUNK, Upstream, chunk, running_proxy, until
from trioproxy.app import create_app
from trioproxy.config import Settings
from trioproxy.events import Event
from trioproxy.observe import logs

Build = Callable[..., House]


async def test_there_are_as_many_connections_as_slots(upstream: Upstream) -> None:
    """httpx's pool would stop at 100."""
    async with running_proxy(upstream.url, scheduler={"concurrency": 150}) as proxy, trio.open_nursery() as nursery:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=proxy.url, trust_env=False, limits=limits, timeout=30) as client:
            async with trio.open_nursery() as sending:
                for _ in range(150):
                    sending.start_soon(client.post, "/v1/embeddings")
                await until(lambda: len(upstream.calls) == 150, 20)
                assert upstream.connections == 150
                nursery.start_soon(upstream.behave, lambda call: call.answer())
            nursery.cancel_scope.cancel()
    assert proxy.recorder.outcomes() == ["success"] * 150


async def test_quarts_timeouts_truncate_nothing(autojump_clock: MockClock, house: Build) -> None:
    """Its RESPONSE_TIMEOUT of 60 s would end a stream as if it were whole, its BODY_TIMEOUT a slow upload."""
    h = house()
    client = h.send(body=None, headers=[("Content-Length", "4")])
    for _ in range(4):
        await trio.sleep(100)
        client.send_body(b"x")
    client.send_body(b"", more=False)
    call = await h.upstream.call()
    assert call.body == b"xxxx"
    await call.send(CHUNKED)
    for _ in range(10):
        await trio.sleep(100)
        await call.send(chunk(b"y"))
    await call.send(LAST_CHUNK)
    await client.answer.done.wait()
    assert client.answer.body == b"y" * 10
    assert client.answer.whole


async def test_quarts_limit_of_16_mib_does_not_apply(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    client = h.send(body=b"x" * (17 * 1024 * 1024), path="/v1/images/edits")
    call = await h.upstream.call()
    assert len(call.body) == 17 * 1024 * 1024
    await call.answer()
    await client.answer.done.wait()
    assert client.answer.status == 200


async def test_a_listener_that_raises_hurts_no_request(upstream: Upstream) -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        heard.append(event)
        raise RuntimeError("broken listener")

    async with running_proxy(upstream.url, (broken,)) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer())
        for _ in range(2):
            assert (await proxy.client.post("/v1/embeddings")).status_code == 200
        assert proxy.recorder.outcomes() == ["success", "success"]
        failures = proxy.app.proxy.metrics.registry.get_sample_value("openai_proxy_listener_failures_total")
        assert failures == len(heard) == 4
        nursery.cancel_scope.cancel()


async def test_a_full_disk_hurts_no_request(upstream: Upstream) -> None:
    writer = logs.configure("debug", "json", Path("/dev/full"), StringIO())
    async with running_proxy(upstream.url) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer())
        for _ in range(20):
            assert (await proxy.client.post("/v1/embeddings")).status_code == 200
        nursery.cancel_scope.cancel()
    await until(lambda: writer.dropped >= 40)
    proxy.assert_settled()
    writer.close()


async def test_idle_connections_are_closed_after_a_while(autojump_clock: MockClock, house: Build) -> None:
    h = house(upstream={"keep_alive_expiry": 30})
    scope = await h.nursery.start(h.proxy.housekeeping)
    for _ in range(3):
        h.send()
    await wait_all_tasks_blocked()
    for _ in range(3):
        await (await h.upstream.call()).answer()
    await wait_all_tasks_blocked()
    assert (h.proxy.upstream.idle, h.upstream.open_connections) == (3, 3)
    await trio.sleep(25)
    assert h.proxy.upstream.idle == 3
    await trio.sleep(15)
    assert (h.proxy.upstream.idle, h.upstream.open_connections) == (0, 0)
    scope.cancel()


def test_starting_makes_no_connection_and_needs_no_key() -> None:
    assert create_app(Settings()).proxy.upstream.idle == 0


def test_routing_remembers_little() -> None:
    app = create_app(Settings())
    for number in range(1_000):
        assert app.find(f"/v1/files/{number}", "GET") == app.find(f"/v1/files/{number}", "GET")
        assert app.find(f"/v1/{number:0>10000}", "GET")[1] == {"rest": f"/{number:0>10000}"}
        with pytest.raises(NotFound):
            app.find(f"/{number}", "GET")
    seen = app._found.cache_info()
    assert seen.hits == 1_000
    assert seen.currsize == seen.maxsize == 256
    assert app.find("/health", "GET")[0].endpoint == "health"
    with pytest.raises(MethodNotAllowed):
        app.find("/health", "POST")
