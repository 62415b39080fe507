"""Accepting, sending and receiving on sockets with as little as can be in between.

Knows nothing of what is sent.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from typing import Final

import trio

ACCEPTED_MAX: Final = 64
"""How many new connections are taken at once."""


def send_at_once(sock: trio.socket.SocketType, data: bytes | bytearray | memoryview) -> int:
    """Send what the kernel takes without waiting, most often all: how many bytes. Raises `BrokenResourceError`.

    No checkpoint: whoever sends without end has to have one. 0 if it has been closed here: others say so.
    """
    descriptor = sock.fileno()
    if descriptor == -1:
        return 0
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise trio.BrokenResourceError from error


async def receive(sock: trio.socket.SocketType, max_bytes: int) -> bytes:
    """What has come, waiting for it; b"" at the end. Raises `BrokenResourceError`, `ClosedResourceError`."""
    while (descriptor := sock.fileno()) != -1:
        await trio.lowlevel.wait_readable(descriptor)
        # Closed between its waking and its turn, the number may be another connection's by now.
        if sock.fileno() == -1:
            break
        try:
            return os.read(descriptor, max_bytes)
        except BlockingIOError:
            pass
        except OSError as error:
            raise trio.BrokenResourceError from error
    raise trio.ClosedResourceError


class Listener(trio.abc.Listener[trio.SocketStream]):
    """A listening socket whose new connections are taken in crowds.

    trio's takes one at each turn. In a rush every turn is long, and an urgent request that comes last would be read
    last: here it is read together with the others, so that the scheduler can put it before them.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self._sock = sock
        self._accepted: deque[trio.SocketStream] = deque()

    async def accept(self) -> trio.SocketStream:
        """The next connection. Raises OSError if there can be no more."""
        if not self._accepted:
            self._accepted.append(await self._listener.accept())
            self._accept_more()
        return self._accepted.popleft()

    def _accept_more(self) -> None:
        while len(self._accepted) < ACCEPTED_MAX:
            try:
                sock, _ = self._sock.accept()
            except OSError:  # no more of them; or something that `accept` is going to say
                break
            self._accepted.append(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))

    async def aclose(self) -> None:
        """Close the listening socket."""
        for stream in self._accepted:
            stream.socket.close()
        await self._listener.aclose()
