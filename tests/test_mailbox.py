"""Messages from a connection to the application."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio.task_group import TaskGroup
from hypercorn.typing import ASGIReceiveEvent, Scope
from trio.testing import MockClock

from trioproxy.mailbox import Mailbox, Tasks

GONE = cast(ASGIReceiveEvent, {"type": "http.disconnect"})


def body(data: bytes, more: bool = True) -> ASGIReceiveEvent:
    return cast(ASGIReceiveEvent, {"type": "http.request", "body": data, "more_body": more})


async def test_messages_come_in_order_and_at_once(autojump_clock: MockClock) -> None:
    box = Mailbox(3)
    for data in (b"a", b"b", b"c"):
        await box.put(body(data))
    assert [await box.receive() for _ in range(3)] == [body(b"a"), body(b"b"), body(b"c")]
    assert trio.current_time() == 0


async def test_the_end_of_a_body_joins_what_is_still_there() -> None:
    box = Mailbox(2)
    await box.put(body(b"a"))
    await box.put(body(b"b"))
    await box.put(body(b"", more=False))
    assert [await box.receive(), await box.receive()] == [body(b"a"), body(b"b", more=False)]
    await box.put(body(b"", more=False))
    assert await box.receive() == body(b"", more=False)


async def test_a_body_does_not_end_behind_a_disconnect() -> None:
    box = Mailbox(2)
    await box.put(GONE)
    await box.put(body(b"", more=False))
    assert [await box.receive(), await box.receive()] == [GONE, body(b"", more=False)]


async def test_who_leaves_a_message_waits_for_room(autojump_clock: MockClock) -> None:
    box = Mailbox(2)
    left: list[float] = []

    async def fill() -> None:
        for number in range(4):
            await box.put(body(b"%d" % number))
            left.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        for number in range(4):
            await trio.sleep(10)
            assert await box.receive() == body(b"%d" % number)
    assert left == [0, 0, 10, 20]


async def test_who_reads_waits_for_a_message(autojump_clock: MockClock) -> None:
    box = Mailbox(2)
    got: list[tuple[float, ASGIReceiveEvent]] = []

    async def read() -> None:
        while True:
            message = await box.receive()
            got.append((trio.current_time(), message))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(5)
        await box.put(body(b"a"))
        await trio.sleep(5)
        await box.put(GONE)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert got == [(5, body(b"a")), (10, GONE)]


async def test_a_disconnect_does_not_wait_for_room(autojump_clock: MockClock) -> None:
    box = Mailbox(1)
    await box.put(body(b"a"))
    with trio.fail_after(1):
        await box.put(GONE)
    assert trio.current_time() == 0
    assert [await box.receive(), await box.receive()] == [body(b"a"), GONE]


async def test_a_disconnect_is_told_at_once_and_nobody_waits_behind_it(autojump_clock: MockClock) -> None:
    box = Mailbox(1)
    told: list[float] = []
    box.on_disconnect = lambda: told.append(trio.current_time())
    await box.put(body(b"a"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.put, body(b"waits for room"))
        await trio.sleep(1)
        await box.put(GONE)
        assert told == [1]
    with trio.fail_after(1):
        await box.put(body(b"too late"))
    assert trio.current_time() == 1
    assert [await box.receive(), await box.receive()] == [body(b"a"), GONE]


async def test_two_who_wait_for_room_both_get_it_and_a_cancelled_one_leaves_nothing(autojump_clock: MockClock) -> None:
    box = Mailbox(1)
    await box.put(body(b"first"))
    with trio.move_on_after(1):
        await box.put(body(b"never"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.put, body(b"second"))
        nursery.start_soon(box.put, body(b"third"))
        await trio.sleep(1)
        received = [await box.receive()]
        for _ in range(2):
            await trio.sleep(1)
            received.append(await box.receive())
    assert received[0] == body(b"first")
    assert sorted(str(message) for message in received[1:]) == sorted(map(str, [body(b"second"), body(b"third")]))


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_the_end_of_a_connection_does_not_wait_for_an_application_that_takes_nothing(
    autojump_clock: MockClock, kind: str
) -> None:
    async def app(*_: object) -> None:
        await trio.sleep(10)

    async def send(_: object) -> None:
        pass

    config = Config()
    config.max_app_queue_size = 1
    async with TaskGroup() as theirs:
        scope = cast(Scope, {"type": kind, "state": {}})
        put = await Tasks(theirs).spawn_app(cast(Any, app), config, scope, send)
        await put(cast(Any, {"type": f"{kind}.receive"}))
        with trio.fail_after(1):
            await put(cast(Any, {"type": f"{kind}.disconnect"}))
    assert trio.current_time() == 10
