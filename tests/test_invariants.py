"""The self-checks of a running proxy: silent when all is well, counted and logged when it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from memory import House
from trioproxy.app import HOUSEKEEPING_SECONDS
from trioproxy.events import Queued

Build = Callable[..., House]


def violations(house: House) -> float:
    count = house.proxy.metrics.registry.get_sample_value("openai_proxy_invariant_violations_total")
    assert count is not None
    return count


async def test_all_is_well_at_every_moment(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler={"concurrency": 1, "max_queue": 1})
    for _ in range(3):
        h.send()
        await wait_all_tasks_blocked()
        h.proxy.check_invariants()
    await (await h.upstream.call()).answer()
    await (await h.upstream.call()).answer()
    await wait_all_tasks_blocked()
    h.proxy.check_invariants()
    assert violations(h) == 0


async def test_a_slot_without_a_request_is_seen(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    client = h.send()
    await h.upstream.call()
    h.proxy.scheduler._present -= 1
    h.proxy.check_invariants()
    assert violations(h) == 1
    h.proxy.scheduler._present += 1
    client.leave()


async def test_a_request_that_waits_beside_a_free_slot_is_seen(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler={"concurrency": 1})
    running = h.send()
    await h.upstream.call()
    waiting = h.send()
    await wait_all_tasks_blocked()
    h.proxy.scheduler._limit.permits = 2
    h.proxy.check_invariants()
    assert violations(h) == 1
    waiting.leave()
    running.leave()


async def test_metrics_that_missed_an_event_are_seen(
    autojump_clock: MockClock, house: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    h = house(scheduler={"concurrency": 1})
    client = h.send()
    await h.upstream.call()
    (request, _) = h.proxy.scheduler.snapshot().running[0]
    h.proxy.metrics(Queued(request, 0))
    h.proxy.check_invariants()
    assert violations(h) == 1
    assert "the metrics count 1 queued requests, the scheduler 0" in capsys.readouterr().out
    client.leave()


async def test_housekeeping_looks_now_and_then(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    scope = await h.nursery.start(h.proxy.housekeeping)
    h.proxy.scheduler._present -= 1
    client = h.send()
    await h.upstream.call()
    await trio.sleep(2.5 * HOUSEKEEPING_SECONDS)
    assert violations(h) == 2
    client.leave()
    scope.cancel()
