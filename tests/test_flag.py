"""An event that is made when somebody waits."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from trioproxy.flag import Flag


async def test_who_waits_is_woken_and_who_comes_later_does_not_wait(autojump_clock: MockClock) -> None:
    flag = Flag()
    woken: list[float] = []

    async def wait() -> None:
        await flag.wait()
        woken.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.sleep(2)
        assert not flag.is_set()
        flag.set()
        flag.set()
        assert flag.is_set()
        await trio.sleep(3)
        await wait()
    assert woken == [2, 2, 5]


async def test_nobody_waits_for_one_that_was_set_before(autojump_clock: MockClock) -> None:
    flag = Flag()
    flag.set()
    with trio.fail_after(1):
        await flag.wait()
    assert trio.current_time() == 0


async def test_a_waiter_can_be_cancelled(autojump_clock: MockClock) -> None:
    flag = Flag()
    with trio.move_on_after(1) as scope:
        await flag.wait()
    assert scope.cancelled_caught
    flag.set()
    await flag.wait()
