"""Sending and receiving on sockets with as little as can be in between.

Knows nothing of what is sent.
"""

from __future__ import annotations

import os

import trio


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
