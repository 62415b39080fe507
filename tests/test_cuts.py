"""Whatever is cut off, and whenever: no slot is lost, nothing is counted twice, no upstream call is left behind.

One request is cut off at its k-th step, for every k until it lives to its end, in each situation; by cancellation of
its task, as at the end of the shutdown grace, and by a disconnect of its client. After each cut the books balance.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from faults import Cut
from memory import Client, House
from support import CHUNKED, LAST_CHUNK, Call, chunk
from trioproxy.events import Ended, Queued, Started

Way = Literal["cancelled", "disconnected"]


async def whole(call: Call) -> None:
    await call.answer(b'{"answer": 42}')


async def streaming(call: Call) -> None:
    await call.send(CHUNKED)
    for _ in range(3):
        await trio.sleep(1)
        await call.send(chunk(b"data: x\n\n"))
    await call.send(LAST_CHUNK)


async def says_nothing(call: Call) -> None:
    await trio.sleep(5)
    await call.close()


async def breaks_off(call: Call) -> None:
    await call.send(CHUNKED + chunk(b"data: x\n\n"))
    await trio.sleep(1)
    await call.close()


async def never(call: Call) -> None:
    await trio.sleep_forever()


async def refuse() -> None:
    await trio.sleep(1)
    raise OSError("refused")


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the request meets."""

    upstream: Callable[[Call], Awaitable[object]] = whole
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    occupied: float = 0
    """For how many seconds another request holds the only slot before; 0 for not at all."""
    evicted: bool = False
    """Whether a more urgent request comes while it waits for the only place."""
    unreachable: bool = False
    reads: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint
    uploads: bool = False
    """Whether its body comes in pieces, with pauses."""
    ends: str | None = "success"
    """The outcome if it is not cut off; None if it is passed through."""


DEADLINE = [("X-Request-Timeout", "2")]
SITUATIONS = {
    "started at once": Situation(),
    "queued, then started": Situation(occupied=5),
    "evicted": Situation(occupied=5, evicted=True, ends="evicted"),
    "timed out in the queue": Situation(occupied=400, ends="timeout"),
    "its own deadline in the queue": Situation(occupied=5, request={"headers": DEADLINE}, ends="timeout"),
    "its own deadline while the upstream works": Situation(
        upstream=never, request={"headers": DEADLINE}, ends="timeout"
    ),
    "its own deadline while streaming": Situation(upstream=streaming, request={"headers": DEADLINE}, ends="timeout"),
    "streaming": Situation(upstream=streaming),
    "streaming, queued before": Situation(upstream=streaming, occupied=5),
    "the upstream refuses": Situation(unreachable=True, ends="upstream_error"),
    "the upstream closes without an answer": Situation(upstream=says_nothing, ends="upstream_error"),
    "the upstream takes too long": Situation(
        upstream=never, settings={"upstream": {"first_byte_timeout": 3}}, ends="timeout"
    ),
    "the upstream stops in mid-answer": Situation(
        upstream=streaming, settings={"upstream": {"idle_timeout": 0.5}}, ends="timeout"
    ),
    "the upstream breaks off": Situation(upstream=breaks_off, ends="upstream_error"),
    "a slow client": Situation(upstream=streaming, reads=partial(trio.sleep, 3)),
    "refused before scheduling": Situation(request={"headers": [("X-Priority", "?")]}, ends=None),
    "the body comes in pieces": Situation(uploads=True),
    "passed through": Situation(request={"path": "/v1/models", "method": "GET", "body": b""}, ends=None),
    "passed through, uploading": Situation(request={"path": "/v1/files"}, uploads=True, ends=None),
}


class Stage:
    """One run of one situation."""

    def __init__(self, situation: Situation, nursery: trio.Nursery) -> None:
        self.situation = situation
        settings = {"scheduler": {"concurrency": 1, "max_queue": 1, "queue_timeout": 100}} | situation.settings
        self.house = House(nursery, **settings)
        self.nursery = nursery
        self.client = self.house.client()
        self.client.reads = situation.reads
        self.others: list[Client] = []

    async def play(self, cut: Cut) -> None:
        """Until the request is over, cut off or not."""
        house = self.house
        if self.situation.occupied:
            await self._occupy(self.situation.occupied)
        self.nursery.start_soon(house.upstream.behave, self.situation.upstream)
        if self.situation.unreachable:
            house.upstream.accept = refuse
        if self.situation.evicted:
            self.nursery.start_soon(self._push_out)
        async with trio.open_nursery() as nursery:
            if self.situation.uploads:
                nursery.start_soon(self._upload)
            cut.follow(trio.lowlevel.current_task())
            await self._request()
            nursery.cancel_scope.cancel()

    async def _request(self) -> None:
        options = {"body": None, "headers": [("Content-Length", "6")]} if self.situation.uploads else {}
        await self.client.post(**(options | self.situation.request))

    async def _occupy(self, seconds: float) -> None:
        self.others.append(self.house.send(body=b'{"other": 1}'))
        call = await self.house.upstream.call()

        async def release() -> None:
            await trio.sleep(seconds)
            await call.answer()

        self.nursery.start_soon(release)

    async def _push_out(self) -> None:
        await trio.sleep(1)
        self.others.append(self.house.send(headers=[("X-Priority", "critical")]))

    async def _upload(self) -> None:
        for _ in range(3):
            await trio.sleep(1)
            self.client.send_body(b"ab")
        self.client.send_body(b"", more=False)

    async def check(self) -> None:
        """The books balance."""
        house = self.house
        for other in self.others:
            await other.answer.done.wait()
        await wait_all_tasks_blocked()
        opened = {event.request for event in house.recorder.events if isinstance(event, Queued | Started | Ended)}
        ended = [event.request for event in house.recorder.ended]
        assert len(ended) == len(set(ended)), "counted twice"
        assert set(ended) == opened, "lost"
        house.assert_settled()
        self.nursery.cancel_scope.cancel()


async def run_once(situation: Situation, way: Way, k: int) -> tuple[bool, list[str]]:
    """Cut at the k-th step: whether there was one, and all outcomes."""
    outcomes: list[str] = []
    async with trio.open_nursery() as nursery:
        stage = Stage(situation, nursery)
        strike = stage.client.cancel_scope.cancel if way == "cancelled" else stage.client.leave
        cut = Cut(k, strike)
        trio.lowlevel.add_instrument(cut)
        try:
            with trio.fail_after(10_000):
                await stage.play(cut)
                trio.lowlevel.remove_instrument(cut)
                await stage.check()
        except Exception as error:
            raise AssertionError(f"cut at step {k}") from error
        outcomes = stage.house.recorder.outcomes()
    return cut.made, outcomes


@pytest.mark.parametrize("way", ["cancelled", "disconnected"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_nothing_is_lost_wherever_it_is_cut_off(name: str, way: Way) -> None:
    situation = SITUATIONS[name]
    k = 0
    made = True
    seen: set[str] = set()
    while made:
        k += 1
        made, outcomes = trio.run(run_once, situation, way, k, clock=MockClock(autojump_threshold=0))
        seen.update(outcomes)
    assert k > 5, "nothing was cut off"
    if situation.ends is not None:
        assert {situation.ends, "cancelled"} <= seen


def test_the_sequence_of_steps_is_the_same_each_time() -> None:
    def steps() -> int:
        return next(
            k
            for k in range(1, 1000)
            if not trio.run(run_once, SITUATIONS["streaming"], "cancelled", k, clock=MockClock(autojump_threshold=0))[0]
        )

    assert steps() == steps()
