"""The streams of clients' connections: watched, given up where a client does not read, ended where nothing goes on.

This module knows nothing of Hypercorn and of the application.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final

import trio

from trioproxy import sockets
from trioproxy.connection import DRAIN_SECONDS
from trioproxy.flag import Flag

LOOK_SECONDS: Final = 1.0
"""How often is looked for connections that have been idle for too long, and for clients that have gone unseen in long
exchanges, and how long is long."""

OVERHEARD_BYTES_MAX: Final = 256
"""How much of each write is overheard: more than a WebSocket's control frame (RFC 6455 section 5.5)."""

CLOSING_SECONDS: Final = 0.5
"""How long a connection's tasks may go on after its client has closed it."""

UNWANTED_SIZE: Final = 64 * 1024

_GONE: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class GuardedStream(trio.abc.HalfCloseableStream):
    """The socket below one of Hypercorn's connections.

    A write without progress for `write_timeout` seconds is given up, inside whatever shield it is called, and the
    socket closed: Hypercorn takes that for a disconnect.
    """

    def __init__(self, stream: trio.SocketStream, write_timeout: float, activity: Activity) -> None:
        self.socket: Final = stream.socket
        self.scope: Final = trio.CancelScope()
        """Around all of the connection's tasks."""
        self.relaying = False
        """Whether the exchange is going to be counted as a request, however it ends."""
        self.more_follows = False
        """Whether what is being sent can wait for what is sent next."""
        self._stream = stream
        self._write_timeout = write_timeout
        self._activity = activity
        self._sending: trio.CancelScope | None = None
        self._exchanges: dict[Callable[[], None], float] = {}
        self._resetting = False
        self._told: Callable[[bytes], None] | None = None
        self._throwing_away = False
        self.encrypted = False
        """Whether what is sent here is encrypted already."""
        self._lingering = False
        self._throwing_rest_away = False
        self._reading = False
        self._read_over: trio.Event | None = None
        """Set when the read that is under way is over, if somebody waits for that."""
        self._gone = Flag()
        self._writes_until = math.inf
        activity.rest(self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, shielded from cancellation as Hypercorn expects it.

        Raises `BrokenResourceError` when the client has gone or does not read.
        """
        if self._resetting:
            # TLS's notice of closing would make the end look clean.
            raise trio.BrokenResourceError
        if not self.encrypted:
            self.tell(data)
        try:
            rest = memoryview(data)[sockets.send_at_once(self.socket, data) :]
        except trio.BrokenResourceError:
            self.leave()
            raise
        if not rest:
            return
        with trio.CancelScope(shield=True) as self._sending:
            while rest:
                self._sending.deadline = min(trio.current_time() + self._write_timeout, self._writes_until)
                try:
                    sent = await self.socket.send(rest)
                except (OSError, trio.ClosedResourceError) as error:
                    self.leave()
                    raise trio.BrokenResourceError from error
                rest = rest[sent:]
        if self._sending.cancelled_caught:
            self.abort()
            if not self._gone.is_set():
                self.leave()
            raise trio.BrokenResourceError

    @property
    def sends_alone(self) -> bool:
        """Whether `send_all` may be called without Hypercorn's shield, and without giving others their turn before.

        Before the application has taken a request on, it must have had its turn.
        """
        return not self.encrypted and bool(self._exchanges)

    async def wait_send_all_might_not_block(self) -> None:
        """As the socket says."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has come from the client; b"" when it has closed its side."""
        if self._throwing_rest_away:
            await self._gone.wait()
            return b""
        data = await self._read(max_bytes)
        while data and self._throwing_away:
            data = await self._read(max_bytes)
        return data

    async def _read(self, max_bytes: int | None) -> bytes:
        self._reading = True
        try:
            data = await sockets.receive(self.socket, max_bytes or UNWANTED_SIZE)
        except trio.BrokenResourceError:
            self.leave()
            raise
        finally:
            self._reading = False
            if self._read_over is not None:
                self._read_over.set()
        if not data:
            self.leave()
        return b"" if self.scope.cancel_called else data  # nothing is begun where all is about to end

    async def send_eof(self) -> None:
        """Close our side, unless the connection is to end with a reset."""
        if not self._resetting:
            await self._stream.send_eof()
            await self.linger()

    async def linger(self) -> None:
        """If so asked, throw away what the client still sends, until it has closed its side, or for a while."""
        if not self._lingering:
            return
        self._throwing_rest_away = True
        with trio.move_on_after(DRAIN_SECONDS):
            while not self._gone.is_set():
                if self._reading:
                    self._read_over = trio.Event()
                    await self._read_over.wait()
                else:
                    await self._read(UNWANTED_SIZE)

    async def aclose(self) -> None:
        """Close the socket."""
        self._gone.set()
        await self._stream.aclose()

    @property
    def has_left(self) -> bool:
        """Whether the client has been seen to have gone."""
        return self._gone.is_set()

    def watch(self, leave: Callable[[], None]) -> None:
        """Call `leave` as soon as the client is seen to have gone, also while nobody reads from it."""
        self._exchanges[leave] = trio.current_time()
        self._writes_until = math.inf
        self._activity.began(self)

    def unwatch(self, leave: Callable[[], None]) -> None:
        """The exchange is over."""
        del self._exchanges[leave]
        if not self._exchanges:  # else the next one has begun
            self.relaying = self.more_follows = False
        self._activity.ended(self, idle=not self._exchanges)

    def stir(self) -> None:
        """A request has been read, which may become an exchange: the connection does not rest any more."""
        self._activity.forget(self)

    def settle(self) -> None:
        """Nothing is going to come of what has been read, or it is over."""
        if not self._exchanges:
            self._activity.rest(self)

    def is_long(self, now: float) -> bool:
        """Whether an exchange has been going on for long enough to be looked at."""
        return any(now - began >= LOOK_SECONDS for began in self._exchanges.values())

    def limit_writes(self, until: float) -> None:
        """No write of this exchange goes on beyond that time: Hypercorn shields it from every deadline outside."""
        self._writes_until = until

    def reset_on_close(self) -> None:
        """Close the connection with a reset, so that an end that is told by closing alone does not look clean."""
        self._resetting = True
        if self.socket.fileno() != -1:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def overhear(self, told: Callable[[bytes], None]) -> None:
        """Call `told` with the beginning of whatever is sent, before it is, as it was before encryption."""
        self._told = told

    def tell(self, data: bytes | bytearray | memoryview) -> None:
        """This is about to be sent."""
        if self._told is not None:
            self._told(bytes(data[:OVERHEARD_BYTES_MAX]))

    def throw_away(self) -> None:
        """From now on, throw away what comes from the client."""
        self._throwing_away = True

    def linger_on_close(self) -> None:
        """The client is still sending: closing at once would make its kernel throw our answer away (RFC 9112 9.6)."""
        self._lingering = True

    def leave(self) -> None:
        """The client has gone: stop what is done for it, and soon everything else on this connection."""
        for leave in list(self._exchanges):
            leave()
        if self._sending is not None:
            self._sending.cancel(reason="the client has gone")
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + CLOSING_SECONDS)
        self._gone.set()

    def abort(self) -> None:
        """Close the socket now; whoever uses it gets an error, and a client that waits for something a reset."""
        if self._exchanges and self.socket.fileno() != -1:
            self.reset_on_close()
        self.socket.close()


class TlsStream:
    """TLS on top of a `GuardedStream`, as Hypercorn wants it.

    Unlike Hypercorn's own it says that it closes (RFC 9112 section 9.8), and takes that from a client as its leaving:
    some close the socket only when they have been answered.
    """

    def __init__(self, guarded: GuardedStream, context: ssl.SSLContext) -> None:
        self.transport_stream: Final = guarded
        guarded.encrypted = True
        self._tls = trio.SSLStream(guarded, context, server_side=True)

    async def do_handshake(self) -> None:
        """Agree on keys and protocol. Raises `BrokenResourceError` with a client that cannot."""
        await self._tls.do_handshake()

    def selected_alpn_protocol(self) -> str | None:
        """The protocol agreed on: "h2" for HTTP/2."""
        protocol: str | None = self._tls.selected_alpn_protocol()
        return protocol

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. Raises `BrokenResourceError` when the client has gone or does not read."""
        self.transport_stream.tell(data)
        await self._tls.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has come from the client; b"" when it has closed its side."""
        data = await self._tls.receive_some(max_bytes)
        if not data:
            self.transport_stream.leave()
        return bytes(data)

    async def send_eof(self) -> None:
        """Close our side: in TLS that is done by `aclose`, before which a client may be let finish."""
        await self.transport_stream.linger()

    async def aclose(self) -> None:
        """Close the connection, with notice if the client takes it at once, also when it has been idle for too long."""
        with trio.move_on_after(CLOSING_SECONDS, shield=True):
            await self._tls.aclose()


class Activity:
    """Which connections have an exchange going on, and which rest, for `idle_timeout` seconds at most."""

    def __init__(self, idle_timeout: float = math.inf) -> None:
        self.idle_timeout = idle_timeout
        self.streams: set[GuardedStream] = set()
        """Those with an exchange."""
        self._resting: dict[GuardedStream, float] = {}  # since when, longest first
        self._count = 0
        self._idle = trio.Event()
        self._idle.set()

    def began(self, stream: GuardedStream) -> None:
        """An exchange has begun there."""
        self.streams.add(stream)
        self.forget(stream)
        if not self._count:
            self._idle = trio.Event()
        self._count += 1

    def ended(self, stream: GuardedStream, *, idle: bool) -> None:
        """An exchange is over; `idle`: it was the last one there."""
        if idle:
            self.streams.discard(stream)
            self.rest(stream)
        self._count -= 1
        if not self._count:
            self._idle.set()

    def rest(self, stream: GuardedStream) -> None:
        """Nothing goes on there from now on."""
        self.forget(stream)  # its place is behind all others, also if it has rested before
        self._resting[stream] = trio.current_time()

    def forget(self, stream: GuardedStream) -> None:
        """It is closed, or does not rest any more."""
        self._resting.pop(stream, None)

    async def wait_idle(self) -> None:
        """Return once no exchange is going on."""
        while self._count:
            await self._idle.wait()

    async def look_around(self) -> None:
        """Now and then, end what has been idle for too long, and look for clients that have gone unseen."""
        while True:
            await trio.sleep(min(LOOK_SECONDS, self.idle_timeout))
            now = trio.current_time()
            self._look_for_the_gone(now)
            self._end_idle(now)

    def _end_idle(self, now: float) -> None:
        while self._resting:
            stream, since = next(iter(self._resting.items()))
            if now - since < self.idle_timeout:
                break
            del self._resting[stream]
            stream.scope.cancel(reason="idle for too long")

    def _look_for_the_gone(self, now: float) -> None:
        """Look at long exchanges for clients that have closed while nobody was reading from their sockets.

        Hypercorn does not read while another request of the same connection waits, nor while an upload is not taken.
        """
        by_descriptor = {stream.socket.fileno(): stream for stream in self.streams if stream.is_long(now)}
        by_descriptor.pop(-1, None)
        poll = select.poll()
        for descriptor in by_descriptor:
            poll.register(descriptor, _GONE & ~(select.POLLHUP | select.POLLERR))
        for descriptor, _ in poll.poll(0):
            by_descriptor[descriptor].leave()
