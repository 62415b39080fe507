"""The simulated clients: what they send, and when they come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import trio

from support import CHUNKED, Call, Upstream, chunk
from trioproxy.demo.scenarios import SCENARIOS, Crowd, Scenario
from trioproxy.demo.traffic import _pause, offer

BACKOFF = 0.01


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (200, {}, None),
        (400, {}, None),
        (503, {"x-should-retry": "true", "retry-after-ms": "1500"}, 1.5),
        (504, {"x-should-retry": "false"}, None),
        (500, {}, BACKOFF),
        (429, {}, BACKOFF),
        (429, {"retry-after-ms": "2000"}, 2.0),
    ],
)
def test_they_come_back_as_official_sdks_do(status: int, headers: Mapping[str, str], expected: float | None) -> None:
    assert _pause(status, headers, BACKOFF) == expected


def scenario(*crowds: Crowd) -> Scenario:
    return replace(SCENARIOS["rush"], crowds=crowds, backoff_seconds=BACKOFF, models_per_second=0.001)


async def ask(nursery: trio.Nursery, crowd: Crowd, upstream: Upstream) -> None:
    """One client of the crowd asks; the next comes after the test."""
    await nursery.start(upstream.serve)
    nursery.start_soon(partial(offer, upstream.url, scenario(crowd), seed=1))


async def completion(upstream: Upstream) -> Call:
    """The next call that is not for the list of models."""
    while (call := await upstream.call()).target == "/v1/models":
        await call.answer()
    return call


async def test_each_says_who_it_is_and_how_urgent() -> None:
    upstream = Upstream()
    async with trio.open_nursery() as nursery:
        await ask(nursery, Crowd(name="chat", per_second=0.01, header="high", field=70, stream=True), upstream)
        call = await completion(upstream)
        nursery.cancel_scope.cancel()
    assert (call.header("x-request-id"), call.header("x-priority")) == ("sim.chat.1", "high")
    assert b'"priority":70' in call.body
    assert b'"stream":true' in call.body


async def test_what_failed_is_tried_twice_more() -> None:
    upstream = Upstream()
    async with trio.open_nursery() as nursery:
        await ask(nursery, Crowd(name="chat", per_second=0.01), upstream)
        for _ in range(2):
            await (await completion(upstream)).answer(status=500)
        await (await completion(upstream)).close()
        with trio.move_on_after(10 * BACKOFF):
            raise AssertionError(await completion(upstream))
        nursery.cancel_scope.cancel()


async def test_a_stream_that_broke_off_is_not_tried_again() -> None:
    async def break_off(call: Call) -> None:
        await call.send(CHUNKED + chunk(b"data: {}\n\n"))
        await call.close()

    upstream = Upstream()
    async with trio.open_nursery() as nursery:
        await ask(nursery, Crowd(name="chat", per_second=0.01, stream=True), upstream)
        await break_off(await completion(upstream))
        with trio.move_on_after(10 * BACKOFF):
            raise AssertionError(await completion(upstream))
        nursery.cancel_scope.cancel()


async def test_who_stops_reading_asks_for_much_and_takes_little_of_it() -> None:
    upstream = Upstream()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(name="stopped", per_second=0.01, header="low", patience=20.0, stops_reading=True)
        await ask(nursery, crowd, upstream)
        call = await completion(upstream)
        assert (call.header("x-request-id"), call.header("x-sim-tokens")) == ("sim.stopped.1", "1000000")
        assert (call.target, call.header("x-priority")) == ("/v1/chat/completions", "low")
        await call.send(CHUNKED)
        sent = 0
        with trio.move_on_after(0.2) as giving_up:
            while sent < 2_000_000:
                await call.send(chunk(b"x" * 250))
                sent += 250
        assert giving_up.cancelled_caught
        assert sent < 200_000
        nursery.cancel_scope.cancel()
