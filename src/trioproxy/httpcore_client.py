"""An HTTP client by httpx's own connection pool, for what `http1_client` does not cover: forward proxies.

httpcore speaks HTTP here; what it cannot know or tell is added from outside, on the stream that it is given: whether
the upstream answers before it has been sent everything (httpcore reads only afterwards), whether more has come than
the answer, and whether a kept connection was dead before a request arrived. Knows nothing of the house.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Final

import httpcore
import trio

from trioproxy import http1
from trioproxy.http1 import Head, Headers
from trioproxy.http1_client import Timing
from trioproxy.network import READ_SIZE, Stream, give_turns
from trioproxy.upload import Body

_ERRORS: Final = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, httpcore.ProxyError)


class _HeardStream(Stream):
    """A stream that is read ahead while a request is being sent, and that listens along."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.has_rest = False
        """More has come than the answer."""
        self._ahead = bytearray()
        self._stopped = False
        self._method = ""
        self._head: http1.HeadReader | None = None
        self._body: http1.BodyReader | None = None

    def begin_request(self, method: str) -> None:
        """Another request is about to be sent."""
        self.begin()
        self._method, self._head, self._body = method, http1.HeadReader(), None

    async def read(self, max_bytes: int = READ_SIZE, timeout: float | None = None) -> bytes:
        if not self._ahead:
            return await self._hear(max_bytes)
        data = bytes(self._ahead[:max_bytes])
        del self._ahead[:max_bytes]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            await super().write(buffer, timeout)
        except httpcore.WriteError as error:
            await self.judge(error)
            raise
        if self._stopped:
            raise httpcore.WriteError("the upstream has answered before it has been sent everything")

    async def listen(self) -> None:
        """Read while a request is being sent, until an answer's head has come or the upstream closes.

        To be cancelled when everything has been sent. What has been read until then is read again by `read`.
        """
        with suppress(httpcore.ReadError):
            while self._body is None and not self.has_rest and (data := await self._hear(READ_SIZE)):
                self._ahead += data
        self._stopped = True
        self.stop_writing()

    async def _hear(self, max_bytes: int) -> bytes:
        try:
            data = await super().read(max_bytes)
        except httpcore.ReadError as error:
            await self.judge(error)
            raise
        if not data:
            await self.judge(None)
        try:
            self._note(data)
        except http1.ProtocolError:
            self.has_rest = True  # httpcore says so too
        return data

    def _note(self, data: bytes) -> None:
        if self._body is None and self._head is not None and (found := self._head.feed(data)) is not None:
            head, data = found
            self._body = http1.body_reader(head, self._method)
        if self._body is not None and data:
            self.has_rest = self._body.complete
            if not self.has_rest:
                self._body.feed(data)
                self.has_rest = self._body.has_rest or self._body.broken is not None


class _Network(httpcore.AsyncNetworkBackend):
    """Makes such streams."""

    def __init__(self) -> None:
        self.stream: _HeardStream | None = None
        """The last one."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> _HeardStream:
        """Connect. Raises `httpcore.ConnectError`."""
        try:
            self.stream = _HeardStream(await trio.open_tcp_stream(host, port))
        except OSError as error:
            raise httpcore.ConnectError from error
        return self.stream


class _Pieces:
    """A body as httpcore wants it."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if piece := await self._body.piece():
            return piece
        if self._body.stopped:
            raise httpcore.WriteError("the upstream has answered before it has been sent everything")
        raise StopAsyncIteration


class Connection:
    """At most one connection, which carries one request at a time. It opens itself as needed."""

    def __init__(
        self, base: httpcore.URL, context: ssl.SSLContext, proxy: httpcore.Proxy | None, expiry: float
    ) -> None:
        self.whole = False
        """Whether the answer has been read to its end."""
        self.at_hand: Final = False
        self._base = base
        self._network: Final = _Network()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            proxy=proxy,
            max_connections=1,
            max_keepalive_connections=1,
            keepalive_expiry=expiry,
            network_backend=self._network,
        )
        self._response: httpcore.Response | None = None
        self._pieces: AsyncIterator[bytes] | None = None

    @property
    def stream(self) -> _HeardStream | None:
        """The connection, if there is one."""
        stream = self._network.stream
        return None if stream is None or stream.closed else stream

    async def ask(self, method: str, target: bytes, headers: Headers, body: Body, timing: Timing) -> Head:
        """Send a request and wait for the head of its answer, as `http1_client.Connection.ask`."""
        kept = self.stream
        self.whole, self._response, self._pieces = False, None, None
        try:
            answer = await self._attempt(method, target, headers, body, timing)
        except (httpcore.NetworkError, httpcore.RemoteProtocolError):
            if kept is None or kept is not self._network.stream or not kept.untouched or not body.rewind():
                raise
            answer = await self._attempt(method, target, headers, body, timing)
        if self.stream is not kept:
            await give_turns()
        return answer

    async def read(self) -> bytes:
        """What has come next of the body; b"" at the end."""
        assert self._pieces is not None
        assert self._response is not None
        if (piece := await anext(self._pieces, b"")) or self.whole:
            return piece
        await self._response.aclose()
        self.whole = True
        return b""

    @property
    def is_kept(self) -> bool:
        """Whether another request can be made on this connection, now that the answer is whole."""
        stream = self.stream
        if not self.whole or stream is None or stream.at_end or stream.has_rest:
            return False
        return not stream.get_extra_info("is_readable")

    async def aclose(self) -> None:
        """Close the connection."""
        await self._pool.aclose()
        if self.stream is not None:
            await self.stream.aclose()  # httpcore forgets it when it is cut off while it agrees on TLS
        if self._pieces is not None:
            # httpcore's nested generators end themselves when they read on; else they are left to the collector.
            with suppress(httpcore.NetworkError, httpcore.RemoteProtocolError):
                while await anext(self._pieces, b""):
                    pass

    def switch(self) -> tuple[httpcore.AsyncNetworkStream, bytes]:
        """The connection of an answer 101, and what has come of the new protocol together with the head."""
        assert self._response is not None
        stream: httpcore.AsyncNetworkStream = self._response.extensions["network_stream"]
        return stream, b""

    async def _attempt(self, method: str, target: bytes, headers: Headers, body: Body, timing: Timing) -> Head:
        timing.connecting()
        call = _Call(self._network, method, body, timing)
        request = httpcore.Request(
            method,
            httpcore.URL(scheme=self._base.scheme, host=self._base.host, port=self._base.port, target=target),
            headers=headers,
            content=_Pieces(body),
            extensions={"timeout": {"write": timing.write_timeout}, "trace": call.trace},
        )
        response = self._response = await call.make(self._pool, request)
        assert not isinstance(response.stream, bytes)
        self._pieces = response.aiter_stream()
        return Head(response.status, response.headers, "1.1")


class _Call:
    """Sending one request and waiting for the head of its answer."""

    def __init__(self, network: _Network, method: str, body: Body, timing: Timing) -> None:
        self._network = network
        self._method = method
        self._body = body
        self._timing = timing
        self._nursery: trio.Nursery | None = None
        self._listening: tuple[trio.CancelScope, trio.Event] | None = None

    async def make(self, pool: httpcore.AsyncConnectionPool, request: httpcore.Request) -> httpcore.Response:
        """Let httpcore do it, and listen beside it while it sends what takes long."""
        if self._body.small is not None:
            return await pool.handle_async_request(request)
        answer: httpcore.Response | Exception
        async with trio.open_nursery() as self._nursery:
            try:
                answer = await pool.handle_async_request(request)
            except _ERRORS as error:
                answer = error
            self._nursery.cancel_scope.cancel()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def trace(self, name: str, info: dict[str, object]) -> None:
        """Told by httpcore how far it is: https://www.encode.io/httpcore/extensions/#trace."""
        stream = self._network.stream
        if getattr(info.get("request"), "method", None) == b"CONNECT" or stream is None:
            return  # a tunnel through a forward proxy belongs to connecting
        match name:
            case "http11.send_request_headers.started":
                stream.begin_request(self._method)
                self._timing.sending()
            case "http11.send_request_body.started" if self._nursery is not None:
                self._listening = trio.CancelScope(), trio.Event()
                self._nursery.start_soon(self._listen, stream, *self._listening)
            case "http11.receive_response_headers.started":
                if self._listening is not None:
                    scope, over = self._listening
                    scope.cancel()
                    await over.wait()
                self._timing.sent()
            case _:
                pass

    async def _listen(self, stream: _HeardStream, scope: trio.CancelScope, over: trio.Event) -> None:
        try:
            with scope:
                await stream.listen()
                self._body.stop()
        finally:
            over.set()
