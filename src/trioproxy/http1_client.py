"""An HTTP/1.1 client: one request after another on one connection (RFC 9112). Knows nothing of the house.

`http1_transport` makes a transport for `httpx.AsyncClient` of it.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import httpcore
import trio

from trioproxy import http1
from trioproxy.http1 import Head, Headers, ProtocolError
from trioproxy.network import Dial, Stream, give_turns
from trioproxy.upload import Body


@dataclass(frozen=True, slots=True)
class Origin:
    """A server that requests are for."""

    host: str
    """A name or an address, without brackets."""
    port: int
    tls: ssl.SSLContext | None
    """None: without TLS."""


class Timing(Protocol):
    """Is told how far a request is."""

    @property
    def write_timeout(self) -> float:
        """Seconds that the server may take for each piece of the request."""
        ...

    def connecting(self) -> None:
        """A new connection is made."""
        ...

    def sending(self) -> None:
        """There is a connection, and the request is sent on it."""
        ...

    def sent(self) -> None:
        """All of the request has been sent, or all that the upstream takes."""
        ...


class Connection:
    """At most one connection, which carries one request at a time. It opens itself as needed."""

    def __init__(self, origin: Origin, dial: Dial = trio.open_tcp_stream) -> None:
        self.stream: Stream | None = None
        """The connection, if there is one."""
        self._origin: Final = origin
        self._dial: Final = dial
        self._head = http1.HeadReader()
        self._body: http1.BodyReader = http1.SizedBody(0)
        self._rest = b""
        """What has come behind the head."""
        self._ready = b""
        """What of it belongs to the body, and has not been read."""
        self._usable = False
        """Whether there may be another request after this one."""
        self._is_new = True
        """Whether this is the connection's first request."""

    async def ask(self, method: str, target: bytes, headers: Headers, body: Body, timing: Timing) -> Head:
        """Send a request and wait for the head of its answer. `headers` say how long the body is, if there is one.

        It is sent once more if the connection was an old one and nothing of the request has arrived. That is known
        only of a connection that failed before a byte of an answer, with nothing of the request acknowledged: whatever
        has reached the upstream's kernel may have been acted on (RFC 9110 section 9.2.2).
        Raises `UnsendableError`, `ProtocolError` and httpcore's network errors and timeouts.
        """
        self._body, self._ready, self._usable, self._is_new = http1.UnsizedBody(), b"", False, False
        head = http1.request_head(method, target, headers)
        size = http1.upload_size(headers)
        if self.stream is not None and self.stream.get_extra_info("is_readable"):
            await self.aclose()  # its end has come, or more than the last answer
        if kept := self.stream:
            await trio.lowlevel.checkpoint_if_cancelled()  # sending may need none
            kept.begin()
            try:
                return await self._attempt(kept, head, method, body, size, timing)
            except (httpcore.NetworkError, ProtocolError) as error:
                await kept.judge(error)
                await self.aclose()
                if not kept.untouched or not body.rewind():
                    raise
        timing.connecting()
        self._is_new = True
        stream = await self._open()
        answer = await self._attempt(stream, head, method, body, size, timing)
        await give_turns()
        return answer

    async def read(self) -> bytes:
        """What has come of the body, joined, 64 KiB or so at most; waits until there is something. b"" at the end.

        With the last piece `whole` may be true already. Raises `ProtocolError` or httpcore's network errors if the
        answer breaks off: not before everything that came until then has been returned.
        """
        assert self.stream is not None
        body = self._body
        piece, self._ready = self._ready, b""
        while not piece and not body.complete:
            if body.broken is not None:
                raise body.broken
            if data := await self.stream.read():
                piece = body.feed(data)
            else:
                self._usable = False
                body.end()
        return piece

    @property
    def at_hand(self) -> bool:
        """Whether the next piece of the body is there already, or its end: it came together with the head."""
        return bool(self._ready) or self._body.complete

    @property
    def whole(self) -> bool:
        """Whether the answer has been read to its end."""
        return self._body.complete and not self._ready

    @property
    def is_kept(self) -> bool:
        """Whether another request can be made on this connection, now that the answer is whole.

        Not if more has come than the answer, if only that it was the last one (RFC 9112 section 9.2). `ask` looks, too;
        here it is for servers that speak before they are asked.
        """
        body, stream = self._body, self.stream
        if not self._usable or not self.whole or body.has_rest or stream is None:
            return False
        return not stream.at_end and not (self._is_new and stream.get_extra_info("is_readable"))

    async def aclose(self) -> None:
        """Close the connection, without notice and without waiting."""
        if self.stream is not None:
            stream, self.stream = self.stream, None
            await stream.aclose()

    def switch(self) -> tuple[Stream, bytes]:
        """The connection of an answer 101, and what has come of the new protocol together with the head."""
        assert self.stream is not None
        return self.stream, self._rest

    async def _open(self) -> Stream:
        origin = self._origin
        try:
            self.stream = Stream(await self._dial(origin.host, origin.port))
        except OSError as error:
            raise httpcore.ConnectError from error
        if origin.tls is not None:
            await self.stream.start_tls(origin.tls, origin.host)
        self.stream.begin()
        return self.stream

    async def _attempt(
        self, stream: Stream, head: bytes, method: str, body: Body, size: int | None, timing: Timing
    ) -> Head:
        self._head = http1.HeadReader()
        timing.sending()
        if (content := body.small) is not None:
            if len(content) != size:
                raise http1.UnsendableError
            with suppress(httpcore.WriteError):  # it may have answered before it closed
                await stream.write(head + content, timing.write_timeout)
            timing.sent()
            answer, sent = await self._read_head(stream), True
        else:
            answer, sent = await self._send_and_listen(stream, head, body, size, timing)
        if answer.status != 101:
            self._body = http1.body_reader(answer, method)
            self._ready = self._body.feed(self._rest)
            self._usable = sent and not http1.is_last(answer)
        return answer

    async def _read_head(self, stream: Stream) -> Head:
        while (found := self._head.feed(data := await stream.read())) is None:
            if not data:
                raise self._head.end()
        answer, self._rest = found
        return answer

    async def _send_and_listen(
        self, stream: Stream, head: bytes, body: Body, size: int | None, timing: Timing
    ) -> tuple[Head, bool]:
        """Send what takes long, and listen meanwhile: the answer ends the sending (RFC 9112 sections 9.5, 9.6).

        Returns the answer's head, and whether everything was sent.
        """
        answer: Head | Exception | None = None
        sent = False

        async def listen() -> None:
            nonlocal answer
            try:
                answer = await self._read_head(stream)
            except (httpcore.NetworkError, ProtocolError) as error:
                answer = error
            if not sent:
                body.stop()
                stream.stop_writing()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            try:
                await _send(stream, head, body, size, timing.write_timeout)
                sent = not body.stopped
            except httpcore.WriteError:
                pass  # it may have answered before it closed
            except (httpcore.WriteTimeout, http1.UnsendableError) as error:
                answer = error
                nursery.cancel_scope.cancel()
            timing.sent()
        if not isinstance(answer, Head):
            assert answer is not None
            raise answer
        return answer, sent


async def _send(stream: Stream, head: bytes, body: Body, size: int | None, timeout: float) -> None:
    """Send a request piece by piece, until it is stopped."""
    await stream.write(head, timeout)
    left = size
    while piece := await body.piece():
        if left is None:
            piece = http1.chunk(piece)
        else:
            left -= len(piece)
            if left < 0:
                raise http1.UnsendableError
        await stream.write(piece, timeout)
    if not body.stopped:
        if left is None:
            await stream.write(http1.LAST_CHUNK, timeout)
        elif left:
            raise http1.UnsendableError
