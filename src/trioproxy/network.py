"""The connections below httpx: what it does not do itself, as streams that it is given to work on.

Each keeps an eye on three things that httpcore cannot know or tell: whether the upstream answers before it has been
sent everything (httpcore reads only afterwards), whether anything of a request can have arrived when a kept connection
turns out to be dead, and whether a read is about to wait or has something at hand. Knows nothing of the house.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
import struct
import sys
from collections.abc import Coroutine, Generator, Iterable
from types import coroutine
from typing import Any, Final

import httpcore
import httpx
import trio

READ_SIZE: Final = 64 * 1024

_WAITING: Final = object()
"""What a read hands to whoever steps it, instead of waiting."""

_INTERIM: Final = re.compile(rb"HTTP/1\.[01] 1(?!01)\d\d[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n")
"""A whole head of an answer 1xx, after which another follows (RFC 9110 section 15.2)."""

_INTERIM_BEGUN: Final = re.compile(rb"(?:HTTP/1\.[01] 1)|(?:HTTP/1\.[01] ?|HTTP/1\.?|HTTP/?|HTT|HT|H)?$")

_REFUSAL_SECONDS: Final = 0.05
_REFUSAL_CHECKS: Final = 10
"""How long, and how often, to look for the refusal of what was sent on a connection that had just been closed."""

_ACKED: Final = struct.Struct("=Q")
_ACKED_AT: Final = 120
"""Where `tcpi_bytes_acked` (RFC 4898) is in Linux's `struct tcp_info`."""


class _Transport(trio.abc.Stream):
    """What TLS works on. Its sending can be stopped without TLS noticing, which could not be read from otherwise."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket: Final = stream.socket
        self._stream = stream
        self._stopped = False
        self._sending: trio.CancelScope | None = None

    def stop_sending(self) -> None:
        """Throw away what is being sent, and will be."""
        self._stopped = True
        if self._sending is not None:
            self._sending.cancel(reason="the upstream has answered")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with trio.CancelScope() as self._sending:
            if not self._stopped:
                await self._stream.send_all(data)
        self._sending = None

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


class Stream(httpcore.AsyncNetworkStream):
    """One connection to the upstream."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self.answered = False
        """The upstream has answered, or closed, before everything was sent: sending the rest is of no use."""
        self.untouched = False
        """The connection has failed, and nothing of the last request has arrived."""
        self.closed = False
        self.at_end = False
        """The upstream has said in TLS that it closes, without being asked for more."""
        self.stepping = False
        """Whether a read that is about to wait says so to `step`."""
        self._stream = stream
        self._transport: _Transport | None = None
        self._early = bytearray()
        self._sending: trio.CancelScope | None = None
        self._acked: int | None = None
        self._heard = self._written = self._judged = False

    def begin(self) -> None:
        """Another request is about to be sent."""
        self.answered = self.untouched = self._heard = self._written = self._judged = False
        self._acked = self._bytes_acked()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has come: all of it, within `max_bytes`."""
        if self._early:
            data = bytes(self._early[:max_bytes])
            del self._early[:max_bytes]
            return data
        if self.stepping:
            await _about_to_wait()
        try:
            data = await self._stream.read(max_bytes, timeout)
        except httpcore.NetworkError as error:
            await self._judge(error)
            raise
        if not data:
            await self._judge(None)
        self._heard = True
        return data + self._decrypted(max_bytes - len(data)) if data else data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send everything. `WriteError` as soon as it is of no use any more: httpcore reads the answer then."""
        with trio.CancelScope() as self._sending:
            if not self.answered:
                try:
                    await self._stream.write(buffer, timeout)
                except httpcore.NetworkError as error:
                    await self._judge(error)
                    raise
                self._written = True
        self._sending = None
        if self.answered:
            raise httpcore.WriteError("the upstream has answered before it has been sent everything")

    async def look_for_early_answer(self) -> None:
        """Read while a request is being sent, until an answer begins or the upstream closes.

        To be cancelled when everything has been sent. What has been read until then is read again by `read`.
        """
        while len(self._early) < READ_SIZE:
            try:
                data = await self._stream.read(READ_SIZE)
            except httpcore.NetworkError as error:
                await self._judge(error)
                break
            if not data:
                await self._judge(None)
                break
            self._heard = True
            self._early += data
            if _has_answer(bytes(self._early)):
                break
        self.answered = True
        if self._transport is not None:
            self._transport.stop_sending()
        elif self._sending is not None:
            self._sending.cancel(reason="the upstream has answered")

    async def aclose(self) -> None:
        """Close it."""
        self.closed = True
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Go on in TLS, on this same object."""
        plain = getattr(self._stream, "_stream", None)
        if isinstance(plain, trio.SocketStream):
            self._transport = _Transport(plain)
            vars(self._stream)["_stream"] = self._transport  # httpcore makes the TLS on top of it
        self._stream = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        return self

    def get_extra_info(self, info: str) -> Any:
        """As httpcore's own."""
        if self._transport is not None and info in ("socket", "is_readable"):
            return self._transport.socket if info == "socket" else self._transport.socket.is_readable()
        return self._stream.get_extra_info(info)

    async def _judge(self, error: Exception | None) -> None:
        """The connection has failed or, without an error, ended: find out whether it is `untouched`.

        It is if nothing could be sent. Otherwise only if the other side has closed, its kernel has refused what came
        later (Linux says EPIPE then, instead of ECONNRESET) and nothing of the request was acknowledged before that:
        a reset alone may come from a server that has read the request and not acknowledged it yet.
        """
        if not self._judged and not self._heard:
            self.untouched = await self._was_refused(error) if self._written else error is not None
            self._judged = True

    async def _was_refused(self, error: Exception | None) -> bool:
        number = _error_number(error)
        for _ in range(_REFUSAL_CHECKS):
            if number or self._acked is None or self._bytes_acked() != self._acked:
                break
            await trio.sleep(_REFUSAL_SECONDS / _REFUSAL_CHECKS)
            number = self.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return number == errno.EPIPE and self._bytes_acked() == self._acked

    def _bytes_acked(self) -> int | None:
        """How much the other side's kernel has acknowledged so far; None where that cannot be known."""
        sock = self.get_extra_info("socket")
        if sock is None or not sys.platform.startswith("linux"):
            return None
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + _ACKED.size)
        except OSError:
            return None
        return int(_ACKED.unpack_from(info, _ACKED_AT)[0]) if len(info) >= _ACKED_AT + _ACKED.size else None

    def _decrypted(self, max_bytes: int) -> bytes:
        """What else has come in TLS records: each is read on its own otherwise."""
        ssl_object = self.get_extra_info("ssl_object")
        data = b""
        while ssl_object is not None and len(data) < max_bytes:
            try:
                more = ssl_object.read(max_bytes - len(data))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError:  # the next read says so too
                self.at_end = True
                break
            if not more:
                self.at_end = True
                break
            data += more
        return data


class Network(httpcore.AsyncNetworkBackend):
    """Makes such streams of what another backend connects."""

    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self.stream: Stream | None = None
        """The last one."""
        self._backend = backend

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect."""
        self.stream = Stream(await self._backend.connect_tcp(host, port, timeout, local_address, socket_options))
        return self.stream


class Connection(httpx.AsyncHTTPTransport):
    """httpx's transport for one connection at a time, on such a stream. Takes httpx's arguments."""

    def __init__(self, backend: httpcore.AsyncNetworkBackend | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._network = Network(backend or httpcore.TrioBackend())
        self._pool._network_backend = self._network  # httpcore's pools take one, but httpx does not hand it on

    @property
    def stream(self) -> Stream | None:
        """Its connection; None before the first call, and once it is closed."""
        stream = self._network.stream
        return None if stream is None or stream.closed else stream

    @property
    def has_rest(self) -> bool:
        """Whether more has come than the last answer, if only that it was the last one: RFC 9112 section 9.2."""
        if self.stream is not None and self.stream.at_end:
            return True
        layer: object = next(iter(self._pool.connections), None)
        while layer is not None and not hasattr(layer, "_h11_state"):
            layer = getattr(layer, "_connection", None)
        return layer is not None and bool(layer._h11_state.trailing_data[0])

    @property
    def last_stream(self) -> Stream | None:
        """Its connection, closed or not."""
        return self._network.stream


def _error_number(error: BaseException | None) -> int:
    """The number of the system's error at the root of it, 0 if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return 0 if error is None else error.errno or 0


def _has_answer(data: bytes) -> bool:
    """Whether more has come than answers 1xx, whole or begun."""
    while (interim := _INTERIM.match(data)) is not None:
        data = data[interim.end() :]
    return bool(data) and _INTERIM_BEGUN.match(data) is None


@coroutine
def _about_to_wait() -> Generator[object, None, None]:
    yield _WAITING


@coroutine
def step(reading: Coroutine[Any, Any, bytes]) -> Generator[Any, Any, bytes | None]:
    """Drive `reading` on until it has returned something, or is about to wait: None, and it can be driven on later."""
    try:
        trap = reading.send(None)
        while trap is not _WAITING:
            try:
                sent = yield trap
            except BaseException as error:
                trap = reading.throw(error)
            else:
                trap = reading.send(sent)
    except StopIteration as returned:
        return bytes(returned.value)
    return None
