"""The stream below a connection: writes without progress, clients that have gone."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trioproxy.streams import Activity, GuardedStream


class SlowSocket:
    """Takes so many bytes every so many seconds."""

    def __init__(self, size: int, seconds: float) -> None:
        self.taken = 0
        self.closed = False
        self._size = size
        self._seconds = seconds

    async def send(self, data: bytes) -> int:
        await trio.sleep(self._seconds)
        sent = min(self._size, len(data))
        self.taken += sent
        return sent

    def close(self) -> None:
        self.closed = True

    def fileno(self) -> int:
        return -1


class SlowStream:
    def __init__(self, slow: SlowSocket) -> None:
        self.socket = slow


def guarded(slow: SlowSocket, write_timeout: float, activity: Activity | None = None) -> GuardedStream:
    return GuardedStream(cast(Any, SlowStream(slow)), write_timeout, activity or Activity())


async def test_a_write_without_progress_is_given_up(autojump_clock: MockClock) -> None:
    slow = SlowSocket(10, 61)
    with trio.CancelScope(shield=True), pytest.raises(trio.BrokenResourceError):
        await guarded(slow, 60).send_all(b"x" * 100)
    assert trio.current_time() == 60
    assert slow.closed


async def test_a_write_with_progress_may_take_long(autojump_clock: MockClock) -> None:
    slow = SlowSocket(10, 59)
    await guarded(slow, 60).send_all(b"x" * 100)
    assert trio.current_time() == 590
    assert slow.taken == 100
    assert not slow.closed


async def test_a_write_does_not_go_on_beyond_the_exchanges_deadline(autojump_clock: MockClock) -> None:
    slow = SlowSocket(10, 4)
    stream = guarded(slow, 60)
    stream.watch(print)
    stream.limit_writes(30)
    with trio.CancelScope(shield=True), pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x" * 1000)
    assert trio.current_time() == 30
    stream.unwatch(print)
    stream.watch(print)
    await stream.send_all(b"x" * 10)


async def test_a_client_that_leaves_ends_a_write_and_what_is_done_for_it(autojump_clock: MockClock) -> None:
    slow = SlowSocket(10, 1000)
    stream = guarded(slow, 60)
    left: list[float] = []
    leave = lambda: left.append(trio.current_time())  # noqa: E731
    stream.watch(leave)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            with trio.CancelScope(shield=True), pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x")

        nursery.start_soon(write)
        await trio.sleep(5)
        stream.leave()
    assert left == [5]
    assert trio.current_time() == 5
    stream.unwatch(leave)


async def test_a_connections_tasks_end_soon_after_its_client_has_gone(autojump_clock: MockClock) -> None:
    stream = guarded(SlowSocket(10, 1), 60)
    with trio.move_on_after(100), stream.scope:
        await trio.sleep(5)
        stream.leave()
        await trio.sleep(0.25)
        stream.leave()
        await trio.sleep_forever()
    assert trio.current_time() == 5.5


async def test_it_is_idle_once_the_last_exchange_is_over(autojump_clock: MockClock) -> None:
    activity = Activity()
    await activity.wait_idle()
    streams = [guarded(SlowSocket(10, 1), 60, activity) for _ in range(2)]
    exchanges = [(streams[0], trio.Event().set), (streams[0], trio.Event().set), (streams[1], trio.Event().set)]
    for stream, leave in exchanges:
        stream.watch(leave)
    over: list[float] = []

    async def end_one_after_another() -> None:
        for stream, leave in exchanges:
            await trio.sleep(5)
            stream.unwatch(leave)
            over.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_one_after_another)
        with trio.move_on_after(100):
            await activity.wait_idle()
        assert trio.current_time() == 15
    assert over == [5, 10, 15]
    assert activity.streams == set()


async def test_a_connection_without_an_exchange_is_closed_after_a_while(autojump_clock: MockClock) -> None:
    activity = Activity(idle_timeout=75)
    ends: list[float] = []

    async def rest(busy_until: float | None) -> None:
        stream = guarded(SlowSocket(10, 1), 60, activity)
        with stream.scope:
            if busy_until is not None:
                await trio.sleep(50)
                stream.watch(print)
                await trio.sleep_until(busy_until)
                stream.unwatch(print)
            await trio.sleep_forever()
        ends.append(trio.current_time())
        activity.forget(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(activity.look_around)
        for busy_until in (None, 1050, 1060):
            nursery.start_soon(rest, busy_until)
        await trio.sleep(1130.5)
        assert ends == [75, 1050 + 75]
        activity.idle_timeout = 70  # a reload
        await trio.sleep(1)
        assert ends == [75, 1050 + 75, 1131]
        nursery.cancel_scope.cancel()


async def test_a_closed_socket_is_a_broken_one() -> None:
    ours, theirs = socket.socketpair()
    stream = GuardedStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), 60, Activity())
    stream.abort()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    theirs.close()


async def test_who_rests_anew_does_not_keep_others_from_their_end(autojump_clock: MockClock) -> None:
    activity = Activity(idle_timeout=75)
    first, second = (guarded(SlowSocket(10, 1), 60, activity) for _ in range(2))
    await trio.sleep(60)
    first.settle()
    activity._end_idle(trio.current_time() + 20)
    assert (first.scope.cancel_called, second.scope.cancel_called) == (False, True)


async def test_what_comes_when_the_connection_is_about_to_end_begins_nothing() -> None:
    guard, client = await pair()
    async with client:
        await client.send_all(b"GET ")
        assert await guard.receive_some() == b"GET "
        guard.scope.cancel(reason="idle for too long")
        await client.send_all(b"/")
        assert await guard.receive_some() == b""
        await guard.aclose()


async def pair() -> tuple[GuardedStream, trio.SocketStream]:
    """A guarded socket and the client's end of it."""
    ours, theirs = socket.socketpair()
    guard = GuardedStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), 60, Activity())
    return guard, trio.SocketStream(trio.socket.from_stdlib_socket(theirs))


async def test_what_is_sent_is_overheard_from_its_beginning() -> None:
    guard, client = await pair()
    heard: list[bytes] = []
    guard.overhear(heard.append)
    await guard.send_all(b"x" * 1000)
    guard.encrypted = True
    await guard.send_all(b"y")
    assert heard == [b"x" * 256]
    await guard.aclose()
    await client.aclose()


async def test_what_is_thrown_away_never_comes_but_the_end_does() -> None:
    guard, client = await pair()
    left = trio.Event()
    guard.watch(left.set)
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await guard.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked(0.01)
        guard.throw_away()
        await client.send_all(b"more")
        await client.aclose()
    assert received == [b""]
    assert left.is_set()
    await guard.aclose()


async def test_a_connection_that_ends_with_a_reset_says_nothing_more() -> None:
    guard, client = await pair()
    guard.reset_on_close()
    with pytest.raises(trio.BrokenResourceError):
        await guard.send_all(b"a notice that it closes")
    await guard.aclose()
    await client.aclose()
