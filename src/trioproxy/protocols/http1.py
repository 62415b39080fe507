"""HTTP/1.1 and HTTP/1.0 on a client's connection (RFC 9112), by Hypercorn's class and h11, or without h11."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import h11
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Body, Data, EndBody, Request, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import H11SendableEvent

from trioproxy.errors import without_quotes
from trioproxy.http1_server import Mark, PlainConnection, PlainRequest, reason_phrase
from trioproxy.protocols.parser import PARSER, READ_AS_TEXT, Parser, unusable_version
from trioproxy.request import METHOD


class Lenient(h11.Connection):
    """h11's connection, deaf to empty lines before a request and to whatever follows a connection's last one.

    RFC 9112 sections 2.2 and 9.6. To h11 these are errors, and to Hypercorn an error is a reason to close, in the
    second case with the answer half sent.
    """

    def receive_data(self, data: bytes) -> None:
        """Take in what has come."""
        if not data or self.their_state is not h11.MUST_CLOSE:
            super().receive_data(data)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What that means."""
        if self.their_state is h11.MUST_CLOSE:
            return h11.NEED_DATA
        if self.their_state is h11.IDLE:
            data = self.trailing_data[0]
            if blank := len(data) - len(data.lstrip(b"\r\n")):
                self._receive_buffer.maybe_extract_at_most(blank)
        event = super().next_event()
        if isinstance(event, h11.Request):
            for name, value in event.headers:
                if name in READ_AS_TEXT and not value.isascii():
                    raise h11.RemoteProtocolError(f"the field {name.decode()} has characters that are not ASCII")
            if reason := _unusable_handshake(event):
                raise h11.RemoteProtocolError(reason)
        return event


def _connection_options(request: h11.Request) -> set[bytes]:
    """What the fields `Connection` name, in lower case (RFC 9110 section 7.6.1)."""
    said = b",".join([value for name, value in request.headers if name == b"connection"])
    return {option.strip().lower() for option in said.split(b",")}


def _unusable_handshake(request: h11.Request) -> str:
    """Why Hypercorn would refuse this handshake of a WebSocket, with an empty answer; or empty, also if it is none."""
    fields = dict(request.headers)
    is_one = request.method.upper() == b"GET" and fields.get(b"upgrade", b"").lower() == b"websocket"
    if not is_one or b"upgrade" not in _connection_options(request):
        return ""
    if request.http_version != b"1.1":
        return "a WebSocket needs HTTP/1.1"
    if b"sec-websocket-key" not in fields:
        return "the WebSocket's handshake has no Sec-WebSocket-Key"
    return unusable_version(fields)


def _asks_for_h2c(request: h11.Request) -> bool:
    """Whether an Upgrade to h2c is one (RFC 7540 section 3.2, RFC 9110 section 7.8), which Hypercorn does not ask.

    A proxy before this one that passes `Upgrade` on by itself would take all that follows for one request.
    """
    settings = sum(name == b"http2-settings" for name, _ in request.headers)
    is_one = request.http_version == b"1.1" and settings == 1
    return is_one and {b"upgrade", b"http2-settings"} <= _connection_options(request)


class Upgrading(H11WSConnection):
    """Hypercorn's stand-in for h11 from a WebSocket's handshake on, with messages that come before its answer.

    A client is to wait for that (RFC 6455 section 4.1). Hypercorn answers one that does not with a refusal of its own,
    also in the midst of another answer; here the messages wait, and go unread with a handshake that is refused.
    """

    def next_event(self) -> Data | type[h11.NEED_DATA]:
        """What has come for the WebSocket."""
        state = self.h11_connection.our_state
        if self.buffer and state is h11.SEND_RESPONSE:
            return cast(type[h11.NEED_DATA], h11.PAUSED)  # which Hypercorn's loop takes as well
        if state is not h11.SWITCHED_PROTOCOL:
            self.buffer.clear()
        return super().next_event()


class Http1(H11Protocol):
    """HTTP/1.1 and HTTP/1.0: without h11 as long as requests are plain, by h11 from the first one on that is not."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parser: Parser = self.connection_state[PARSER]
        self._held = b""
        self._plain: PlainConnection | None = PlainConnection(self.config.h11_max_incomplete_size)
        self.connection = cast(h11.Connection, self._plain)

    async def handle(self, event: Event) -> None:
        """What has come from the client."""
        if self._plain is None or not isinstance(event, RawData):
            await super().handle(event)
            return
        self._plain.receive_data(event.data)
        try:
            await self._handle_plain(self._plain)
        except h11.RemoteProtocolError as error:
            if self._plain.our_state is h11.SEND_RESPONSE:
                await self._send_error_response(error.error_status_hint)
            await self.send(Closed())

    async def _handle_plain(self, plain: PlainConnection) -> None:
        """As Hypercorn does it with h11's events."""
        while True:
            event = plain.next_event()
            if isinstance(event, PlainRequest):
                await self._begin(event)
            elif event is Mark.PAUSED:
                await self.can_read.clear()
                await self.can_read.wait()
            elif event is Mark.ODD:
                await self._go_on_with_h11(plain)
                break
            elif event is Mark.NEED_DATA or event is Mark.CLOSED or self.stream is None:
                break
            elif isinstance(event, bytes):
                await self.stream.handle(Body(stream_id=STREAM_ID, data=event))
            else:
                await self.stream.handle(EndBody(stream_id=STREAM_ID))

    async def _begin(self, request: PlainRequest) -> None:
        self._parser.below.stir()
        method = self.connection_state[METHOD] = request.method.decode("ascii")
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        begun = Request(
            stream_id=STREAM_ID,
            headers=request.headers,
            http_version="1.1",
            method=method,
            raw_path=request.target,
            state=self.connection_state,
        )
        await self.stream.handle(begun)
        await self.context.mark_request()

    async def _go_on_with_h11(self, plain: PlainConnection) -> None:
        self._plain = None
        self.connection = Lenient(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        data, is_all = plain.rest()
        if data:
            self.connection.receive_data(data)
        if is_all:
            self.connection.receive_data(b"")
        await self._handle_events()

    async def _check_protocol(self, event: h11.Request) -> None:
        self.connection_state[METHOD] = event.method.decode("ascii")
        if event.method == b"PRI" or _asks_for_h2c(event):
            await super()._check_protocol(event)

    async def _create_stream(self, request: h11.Request) -> None:
        await super()._create_stream(request)
        if isinstance(self.connection, H11WSConnection):
            self.connection = Upgrading(self.connection.h11_connection)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send what the application has to say."""
        if self._plain is None:
            await super().stream_send(event)
            if isinstance(event, Response) and isinstance(self.connection, Upgrading):
                await self.can_read.set()
            return
        match event:
            case Response():
                await self._send_together(partial(self._plain.head, event.status_code, event.headers), is_last=False)
            case Body():
                await self._send_together(partial(self._plain.data, event.data), is_last=False)
            case EndBody():
                await self._send_together(self._plain.end, is_last=True)
            case _:
                await super().stream_send(event)

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        if isinstance(event, h11.Response):
            event = h11.Response(
                status_code=event.status_code, headers=event.headers, reason=reason_phrase(event.status_code)
            )
        is_last = isinstance(event, h11.EndOfMessage)
        await self._send_together(partial(self.connection.send, event), is_last=is_last)

    async def _send_together(self, write: Callable[[], bytes], *, is_last: bool) -> None:
        """Send what is written, together with what has been held back; hold it back if more is about to follow."""
        try:
            self._held += write()
        except h11.LocalProtocolError:
            if self.connection.their_state is not h11.ERROR:  # else it has been answered already
                raise
            return
        if self._held and (is_last or not self._parser.below.more_follows):
            held, self._held = self._held, b""
            await self.send(RawData(data=held))

    async def _send_error_response(self, status_code: int) -> None:
        """Answer what could not be read; its error is still being handled."""
        scope = self.stream.scope if isinstance(self.stream, HTTPStream) else None
        method, path = (scope["method"], scope["raw_path"].decode("latin-1")) if scope else ("", "")
        reason = without_quotes(str(sys.exception()))
        status, headers, body = self._parser.refuse(reason, method, path)
        headers = [*headers, (b"connection", b"close")]
        await self.stream_send(Response(stream_id=STREAM_ID, headers=headers, status_code=status))
        await self.stream_send(Body(stream_id=STREAM_ID, data=body))
        await self.stream_send(EndBody(stream_id=STREAM_ID))
