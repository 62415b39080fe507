"""Reading and writing on bare descriptors: never on one that belongs to somebody else by now."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Final

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, assert_no_checkpoints, wait_all_tasks_blocked

from trioproxy import sockets


class BeforeItsNextTurn(trio.abc.Instrument):
    """Does something between a task's waking and its turn."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._task: Final = trio.lowlevel.current_task()
        self._action: Final = action

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._action()
            trio.lowlevel.remove_instrument(self)


@contextmanager
def pair() -> Iterator[tuple[trio.socket.SocketType, socket.socket]]:
    """Two ends of a connection: ours, and the other side's."""
    ours, theirs = socket.socketpair()
    with trio.socket.from_stdlib_socket(ours) as wrapped, theirs:
        yield wrapped, theirs


async def test_what_has_come_is_received_and_then_the_end() -> None:
    with pair() as (ours, theirs):
        theirs.send(b"some")
        theirs.send(b"thing")
        assert await sockets.receive(ours, 5) == b"somet"
        assert await sockets.receive(ours, 5) == b"hing"
        theirs.close()
        assert await sockets.receive(ours, 5) == b""


async def test_receiving_waits_and_a_closed_socket_ends_the_waiting() -> None:
    with pair() as (ours, theirs):
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await sockets.receive(ours, 10))
            with pytest.raises(trio.ClosedResourceError):
                await sockets.receive(ours, 10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            theirs.send(b"late")
            await wait_all_tasks_blocked()
            assert got == [b"late"]
            ours.close()
        with pytest.raises(trio.ClosedResourceError):
            await sockets.receive(ours, 10)


async def test_a_number_that_is_another_connections_by_now_is_not_read_from() -> None:
    with pair() as (ours, theirs), pair() as (strangers, other_side):
        other_side.send(b"not for you")

        def reuse() -> None:
            number = ours.fileno()
            ours.close()
            assert os.dup2(strangers.fileno(), number) == number
            taken.append(number)

        taken: list[int] = []
        theirs.send(b"for you")
        trio.lowlevel.add_instrument(BeforeItsNextTurn(reuse))
        try:
            with pytest.raises(trio.ClosedResourceError):
                await sockets.receive(ours, 100)
        finally:
            os.close(taken[0])
        assert await sockets.receive(strangers, 100) == b"not for you"


async def test_sending_returns_how_much_the_kernel_takes() -> None:
    with pair() as (ours, theirs):
        assert sockets.send_at_once(ours, b"hello") == 5
        assert theirs.recv(10) == b"hello"
        sent = sockets.send_at_once(ours, bytes(1 << 24))
        assert 0 < sent < 1 << 24
        assert sockets.send_at_once(ours, b"x") == 0
        with closing(theirs):
            pass
        with pytest.raises(trio.BrokenResourceError):
            sockets.send_at_once(ours, b"x")
        ours.close()
        assert sockets.send_at_once(ours, b"x") == 0


def listening() -> socket.socket:
    """A listening socket on the loopback interface."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(200)
    return sock


async def test_connections_that_wait_are_taken_in_crowds(autojump_clock: MockClock) -> None:
    sock = listening()
    listener = sockets.Listener(sock)
    clients = [socket.create_connection(sock.getsockname()) for _ in range(sockets.ACCEPTED_MAX + 3)]
    served = []
    for crowd in (sockets.ACCEPTED_MAX, 3):
        with assert_checkpoints():
            served.append(await listener.accept())
        with assert_no_checkpoints():
            served += [await listener.accept() for _ in range(crowd - 1)]
    assert [stream.socket.getpeername() for stream in served] == [client.getsockname() for client in clients]
    with trio.move_on_after(1) as scope:
        await listener.accept()
    assert scope.cancelled_caught
    for stream in served:
        await stream.aclose()
    await listener.aclose()
    for client in clients:
        client.close()


async def test_who_was_taken_and_not_served_is_closed_with_the_listener() -> None:
    sock = listening()
    listener = sockets.Listener(sock)
    clients = [socket.create_connection(sock.getsockname()) for _ in range(3)]
    async with listener, await listener.accept():
        pass
    for client in clients:
        assert client.recv(1) == b""
        client.close()


async def test_accepting_fails_where_there_can_be_no_more_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    sock = listening()
    async with sockets.Listener(sock) as listener:
        clients = [socket.create_connection(sock.getsockname()) for _ in range(2)]
        taken = 0

        def accept(self: socket.socket) -> object:
            nonlocal taken
            taken += 1
            if taken > 1:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(self)

        real = socket.socket._accept  # type: ignore[attr-defined]
        monkeypatch.setattr(socket.socket, "_accept", accept)
        async with await listener.accept():
            with pytest.raises(OSError, match="open files"):
                await listener.accept()
            monkeypatch.undo()
            async with await listener.accept():
                pass
        for client in clients:
            client.close()
