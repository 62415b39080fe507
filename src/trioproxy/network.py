"""The connections below the HTTP clients: trio's streams, as httpcore wants its network streams.

Each keeps an eye on what an HTTP client needs and trio does not tell: whether anything of a request can have arrived
when a kept connection turns out to be dead, and whether TLS was ended with notice. Its sending can be stopped without
hurting TLS, since an upstream may answer before it has been sent everything. Knows nothing of HTTP and of the house.
"""

from __future__ import annotations

import errno
import math
import socket
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import httpcore
import trio

from trioproxy import sockets

READ_SIZE: Final = 64 * 1024

_REFUSAL_SECONDS: Final = 0.05
_REFUSAL_CHECKS: Final = 10
"""How long, and how often, to look for the refusal of what was sent on a connection that had just been closed."""

_TURNS: Final = 5

_ACKED: Final = struct.Struct("=Q")
_ACKED_AT: Final = 120
"""Where `tcpi_bytes_acked` (RFC 4898) is in Linux's `struct tcp_info`."""

Dial = Callable[[str, int], Awaitable[trio.abc.Stream]]
"""Connects to a host's port. Raises OSError."""


class _Transport(trio.abc.Stream):
    """What is sent and read goes through here, below TLS if there is any; to sockets as directly as can be.

    Sending can be stopped without TLS noticing: cut off in sending, it could not be read from any more.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.waits = True
        """Whether reading waits until something comes; else it raises `trio.WouldBlock`."""
        self.sends_until = math.inf
        """When sending is given up."""
        self.sent = 0
        """How many bytes the other side may have got."""
        self.socket: Final = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._stream = stream
        self._stopped = False
        self._sending: trio.CancelScope | None = None

    def stop_sending(self) -> None:
        """Throw away what is being sent, and will be."""
        self._stopped = True
        if self._sending is not None:
            self._sending.cancel(reason="the upstream has answered")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._stopped:
            return
        sent = 0
        if self.socket is not None:
            sent = sockets.send_at_once(self.socket, data)
            self.sent += len(data)  # or less, if it fails in between
        if rest := memoryview(data)[sent:]:
            with trio.CancelScope(deadline=self.sends_until) as self._sending:
                await self._stream.send_all(rest)
            if self._sending.cancelled_caught and not self._stopped:
                raise httpcore.WriteTimeout
            self._sending = None
        if self.socket is None:
            self.sent += len(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self.waits:
            raise trio.WouldBlock
        if self.socket is None:
            return await self._stream.receive_some(max_bytes)
        return await sockets.receive(self.socket, max_bytes or READ_SIZE)

    async def aclose(self) -> None:
        await self._stream.aclose()


class Stream(httpcore.AsyncNetworkStream):
    """One connection. Errors are httpcore's: `ConnectError`, `ReadError`, `WriteError`…"""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.untouched = False
        """The connection has failed, and nothing of the last request has arrived."""
        self.closed = False
        self.at_end = False
        """The upstream has said in TLS that it closes."""
        self._transport: Final = _Transport(stream)
        self._over: trio.abc.Stream = self._transport
        """What is written to and read from."""
        self._sent_before = 0
        self._acked_at_first = self._bytes_acked()
        self._heard = False
        self._write_error: httpcore.WriteError | None = None

    def begin(self) -> None:
        """Another request is about to be sent."""
        self.untouched = self._heard = False
        self._write_error = None
        self._sent_before = self._transport.sent

    async def read(self, max_bytes: int = READ_SIZE, timeout: float | None = None) -> bytes:
        """What has come: all of it, up to about `max_bytes`. Waits until there is something; b"" at the end."""
        try:
            data = bytes(await self._over.receive_some(max_bytes))
            if data and self._over is not self._transport:
                data += await self._decrypted(max_bytes - len(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            if isinstance(error.__cause__, ssl.SSLEOFError):
                # RFC 9112 section 9.8: anyone on the way can close a TCP connection.
                raise httpcore.ReadError(
                    "the TLS connection was closed without notice (close_notify), maybe not by the upstream."
                ) from None
            raise httpcore.ReadError from error
        self._heard = self._heard or bool(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send everything, within `timeout` seconds; nothing any more once sending is stopped."""
        self._transport.sends_until = math.inf if timeout is None else trio.current_time() + timeout
        try:
            await self._over.send_all(buffer)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._write_error = httpcore.WriteError()
            raise self._write_error from error

    def stop_writing(self) -> None:
        """Throw away what is being sent, and will be: the upstream does not want it."""
        self._transport.stop_sending()

    async def aclose(self) -> None:
        """Close it."""
        self.closed = True
        await self._transport.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Stream:
        """Go on in TLS, on this same object."""
        tls = trio.SSLStream(self._transport, ssl_context, server_hostname=server_hostname)
        self._over = tls
        try:
            await tls.do_handshake()
        except trio.BrokenResourceError as error:
            raise httpcore.ConnectError from error
        return self

    def get_extra_info(self, info: str) -> object:
        """As httpcore's own, of what is asked for here: `socket`, and `is_readable`: whether an idle one has ended."""
        found = self._transport.socket
        if info == "is_readable":
            return found is not None and found.is_readable()
        return found if info == "socket" else None

    async def judge(self, error: Exception | None) -> None:
        """The connection has failed or, without an error, ended: find out whether it is `untouched`.

        It is if nothing could be sent. Otherwise only if the other side has closed, its kernel has refused what came
        later (Linux says EPIPE then, instead of ECONNRESET) and nothing of the request was acknowledged before that:
        a reset alone may come from a server that has read the request and not acknowledged it yet.
        """
        if not self._heard:
            has_sent = self._transport.sent > self._sent_before
            self.untouched = await self._was_refused(error) if has_sent else error is not None

    async def _was_refused(self, error: Exception | None) -> bool:
        number = _error_number(self._write_error or error)
        for _ in range(_REFUSAL_CHECKS):
            if number or not self._nothing_is_acknowledged:
                break
            await trio.sleep(_REFUSAL_SECONDS / _REFUSAL_CHECKS)
            if self._transport.socket is not None:
                number = self._transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return number == errno.EPIPE and self._nothing_is_acknowledged

    @property
    def _nothing_is_acknowledged(self) -> bool:
        """Of the last request; whatever was sent before has been answered."""
        acked = self._bytes_acked()
        return acked is not None and acked - (self._acked_at_first or 0) == self._sent_before

    def _bytes_acked(self) -> int | None:
        """How much the other side's kernel has acknowledged so far; None where that cannot be known."""
        if self._transport.socket is None or not sys.platform.startswith("linux"):
            return None
        try:
            info = self._transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + _ACKED.size)
        except OSError:
            return None
        return int(_ACKED.unpack_from(info, _ACKED_AT)[0]) if len(info) >= _ACKED_AT + _ACKED.size else None

    async def _decrypted(self, max_bytes: int) -> bytes:
        """What else has come in TLS records: each is read on its own otherwise."""
        data = b""
        self._transport.waits = False
        try:
            while len(data) < max_bytes and not self.at_end:
                more = await self._over.receive_some(max_bytes - len(data))
                self.at_end = not more
                data += more
        except (trio.WouldBlock, trio.BrokenResourceError):
            pass  # the next read waits, or fails too
        finally:
            self._transport.waits = True
        return data


async def give_turns() -> None:
    """Let others have their turn between the first answer on a connection and the look whether more has come.

    A server that speaks before it is asked may have its answer to the request still to come, which would be taken for
    the answer to the next one (RFC 9112 section 9.2).
    """
    for _ in range(_TURNS):
        await trio.lowlevel.checkpoint()


def _error_number(error: BaseException | None) -> int:
    """The number of the system's error at the root of it, 0 if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return 0 if error is None else error.errno or 0
