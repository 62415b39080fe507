"""Hypercorn's protocol classes, with what HTTP demands of them and they do not do. None of them is patched.

HTTP/1.1: refusals in OpenAI's shape, and counted; empty lines before a request. HTTP/2: a stream that can be reset
alone, back-pressure that holds when the client's window is closed, uploads that do not hold each other up. Both: the
method in its own letter case. This module knows nothing of scheduling or of the upstream.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, cast

import h2.errors
import h2.events
import h2.exceptions
import h11
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, Data, EndBody, EndData, Request, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import (
    STREAM_ID,
    H2CProtocolRequiredError,
    H2ProtocolAssumedError,
    H11Protocol,
    H11WSConnection,
)
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import TrioSingleTask
from hypercorn.typing import H11SendableEvent
from hypercorn.typing import TaskGroup as AnyTaskGroup
from priority.priority import MissingStreamError
from wsproto.connection import ConnectionState

from trioproxy.errors import Headers, without_quotes
from trioproxy.http1_server import Mark, PlainConnection, PlainRequest, reason_phrase
from trioproxy.mailbox import Tasks
from trioproxy.request import METHOD

PARSER: Final = "trioproxy.parser"
"""The key in a connection's state under which the server puts what the protocols need."""

CONNECTION_WINDOW: Final = 1 << 24
"""Bytes of uploads that one HTTP/2 connection may have sent before any of them is taken."""


class Refusing(Protocol):
    """Says what to answer to what cannot be read, and counts it."""

    def __call__(self, reason: str, method: str, path: str) -> tuple[int, Headers, bytes]:
        """Status, headers and body of the answer."""
        ...


class Below(Protocol):
    """The stream below the protocols, as far as it concerns them."""

    more_follows: bool
    """Whether what is being sent can wait for what is sent next."""

    def stir(self) -> None:
        """A request has been read: the connection does not rest any more."""
        ...

    def settle(self) -> None:
        """Nothing is going to come of what has been read, or it is over."""
        ...

    @property
    def sends_alone(self) -> bool:
        """Whether sending needs nobody's shield from cancellation."""
        ...


@dataclass(frozen=True, slots=True)
class Parser:
    """What the protocols of one connection need of the server."""

    refuse: Refusing
    write_timeout: float
    below: Below


READ_AS_TEXT: Final = frozenset({b"connection", b"upgrade", b"sec-websocket-protocol", b"sec-websocket-extensions"})
"""Fields that Hypercorn reads as ASCII, and fails on if they are not."""


class NoTask:
    """In place of Hypercorn's task for each pause between two requests: the stream below knows what rests."""

    def __init__(self, below: Below) -> None:
        self._below = below

    async def restart(self, task_group: AnyTaskGroup, action: Callable[[], Awaitable[None]]) -> None:
        """The connection is idle from now on."""
        self._below.settle()

    async def stop(self) -> None:
        """It is not."""
        self._below.stir()


class HttpServer(TCPServer):
    """Hypercorn's server of one connection, with protocols of ours."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.idle_task = cast(TrioSingleTask, NoTask(self.state[PARSER].below))

    async def _read_data(self) -> None:
        """As Hypercorn's, but that nothing is kept of what has been read while more is waited for."""
        more = True
        while more:
            try:
                data = await self.stream.receive_some(MAX_RECV)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                break
            more = bool(data)
            await self.protocol.handle(RawData(bytes(data)))
            del data
        await self.protocol.handle(Closed())

    async def protocol_send(self, event: Event) -> None:
        """As Hypercorn's, but that waiting for its lock is shielded too, or without both where nobody is waited for."""
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        if not self.state[PARSER].below.sends_alone or self.send_lock.locked():
            with trio.CancelScope(shield=True):
                await super().protocol_send(event)
            return
        self.send_lock.acquire_nowait()
        try:
            await self.stream.send_all(event.data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())
        finally:
            self.send_lock.release()

    @property
    def protocol(self) -> Protocols:
        """What it has put together, replaced."""
        return self._protocol

    @protocol.setter
    def protocol(self, theirs: ProtocolWrapper) -> None:
        self._protocol = Protocols(theirs)


class Protocols(ProtocolWrapper):
    """Chooses the protocol of a connection, as Hypercorn's does."""

    def __init__(self, theirs: ProtocolWrapper) -> None:
        self.__dict__.update(theirs.__dict__)
        self.task_group = Tasks(cast(TaskGroup, theirs.task_group))
        self.protocol = self._begin(Http2 if isinstance(theirs.protocol, H2Protocol) else Http1)

    async def handle(self, event: Event) -> None:
        """What has come from the client."""
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as error:
            await self._switch(error.data)
        except H2CProtocolRequiredError as error:
            await self._switch(error.data, error.headers, error.settings)

    async def _switch(self, data: bytes, *request: object) -> None:
        self.protocol = self._begin(Http2)
        await self.protocol.initiate(*request)  # type: ignore[arg-type]
        if data:
            await self.protocol.handle(RawData(data=data))
        self.state[PARSER].below.settle()

    def _begin(self, kind: type[Http1] | type[Http2]) -> Http1 | Http2:
        return kind(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            self.ssl,
            self.client,
            self.server,
            self.send,
        )


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
    return _unusable_version(fields)


def _unusable_version(fields: dict[bytes, bytes]) -> str:
    """Why the version of a WebSocket cannot be had (RFC 6455 section 4.1); or empty."""
    is_known = fields.get(b"sec-websocket-version") == b"13"
    return "" if is_known else "the WebSocket's handshake has no Sec-WebSocket-Version of 13"


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


@dataclass(slots=True)
class _Upload:
    """What has come of a stream's body and has not been taken."""

    data: bytearray = field(default_factory=bytearray)
    credit: int = 0
    """Bytes of the stream's window that taking it gives back."""
    owed: int = 0
    """The same, and what is just being taken."""
    ended: bool = False
    changed: trio.Event = field(default_factory=trio.Event)


def _unusable(fields: dict[bytes, bytes], *, ended: bool) -> str:
    """Why Hypercorn would fail on an HTTP/2 request with these fields, and all of the connection with it; or empty.

    `ended`: no body follows. h2 compares that with what was announced only where one does (RFC 9113 section 8.1.1).
    """
    if not fields[b":method"].isascii():
        return "the method has characters that are not ASCII"
    if not fields.get(b":path", b"").isascii():
        return "the path has characters that must be percent-encoded"
    if fields[b":method"].upper() == b"CONNECT" and fields.get(b":protocol") != b"websocket":
        return "CONNECT is served for WebSockets alone: this is no forward proxy"
    if fields[b":method"].upper() == b"CONNECT" and (reason := _unusable_version(fields)):
        return reason
    if ended and fields.get(b"content-length", b"").strip(b"0"):
        return "Content-Length announces a body, and none has come"
    wrong = [name.decode() for name in READ_AS_TEXT if not fields.get(name, b"").isascii()]
    return f"the field {wrong[0]} has characters that are not ASCII" if wrong else ""


def _is_closed(stream: HTTPStream | WSStream | None) -> bool:
    """Whether this is a WebSocket that both sides have closed."""
    return isinstance(stream, WSStream) and stream.connection.state is ConnectionState.CLOSED


class Http2(H2Protocol):
    """HTTP/2. Each stream has its own fate: what happens to one holds no other up."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parser: Parser = self.connection_state[PARSER]
        self._uploads: dict[int, _Upload] = {}
        self._sending: dict[int, trio.CancelScope] = {}
        self._unfinished: set[int] = set()

    async def initiate(self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None) -> None:
        """Begin. The window of a connection is that of many streams: one that is not taken leaves room for others."""
        await super().initiate(headers, settings)
        self.connection.increment_flow_control_window(CONNECTION_WINDOW)
        await self._flush()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            match event:
                case h2.events.RequestReceived():
                    await self._request_received(event)
                case h2.events.DataReceived():
                    self._data_received(event)
                case h2.events.StreamEnded() if event.stream_id in self._uploads:
                    self._unfinished.discard(event.stream_id)
                    self._uploads[event.stream_id].ended = True
                    self._uploads[event.stream_id].changed.set()
                case h2.events.StreamEnded() if isinstance(self.streams.get(event.stream_id), WSStream):
                    self._unfinished.discard(event.stream_id)
                    await self._close_stream(event.stream_id)  # what a FIN is to HTTP/1.1 (RFC 8441 section 5)
                case h2.events.StreamEnded():
                    self._unfinished.discard(event.stream_id)
                    await super()._handle_events([event])
                case h2.events.StreamReset():
                    self._unfinished.discard(event.stream_id)
                    await super()._handle_events([event])
                    await self._throw_away(event.stream_id)
                case _:
                    await super()._handle_events([event])
        await self._flush()

    async def _request_received(self, event: h2.events.RequestReceived) -> None:
        fields = dict(event.headers)
        method, path = fields[b":method"].decode("latin-1"), fields.get(b":path", b"")
        if reason := _unusable(fields, ended=event.stream_ended is not None):
            status, headers, body = self._parser.refuse(reason, method, path.decode("latin-1"))
            with suppress(h2.exceptions.ProtocolError):  # it may have been reset in the same breath
                self.connection.send_headers(event.stream_id, [(b":status", b"%d" % status), *headers])
                if len(body) <= self.connection.local_flow_control_window(event.stream_id):
                    self.connection.send_data(event.stream_id, body, end_stream=True)
                else:
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.CANCEL)
            return
        self.connection_state[METHOD] = method
        if event.stream_ended is None:
            self._unfinished.add(event.stream_id)
        self._parser.below.stir()
        await super()._handle_events([event])

    def _data_received(self, event: h2.events.DataReceived) -> None:
        if event.stream_id not in self.streams:  # it has been answered already
            with suppress(h2.exceptions.ProtocolError):
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            return
        upload = self._uploads.get(event.stream_id)
        if upload is None:
            upload = self._uploads[event.stream_id] = _Upload()
            self.task_group.spawn(self._hand_over, event.stream_id, upload)
        upload.data += event.data
        upload.credit += event.flow_controlled_length
        upload.owed += event.flow_controlled_length
        upload.changed.set()

    async def _hand_over(self, stream_id: int, upload: _Upload) -> None:
        """Give a stream's body to the application as it takes it, and its window back to the client."""
        while (stream := self.streams.get(stream_id)) is not None:
            data, credit = bytes(upload.data), upload.credit
            upload.data.clear()
            upload.credit = 0
            if data:
                await stream.handle(Body(stream_id=stream_id, data=data))
            if credit:
                await self._give_back(stream_id, upload, credit)
            elif upload.ended:
                if isinstance(stream, WSStream):
                    await self._close_stream(stream_id)
                else:
                    await stream.handle(EndBody(stream_id=stream_id))
                break
            else:
                upload.changed = trio.Event()
                await upload.changed.wait()
        self._uploads.pop(stream_id, None)

    async def _give_back(self, stream_id: int, upload: _Upload, size: int) -> None:
        """Let the client send as much again."""
        size = min(size, upload.owed)
        upload.owed -= size
        with suppress(h2.exceptions.ProtocolError):
            self.connection.acknowledge_received_data(size, stream_id)
        await self._flush()

    async def stream_send(self, event: StreamEvent) -> None:
        """Send what the application has to say; a client whose window stays closed does not hold it for ever."""
        match event:
            case Body() | EndBody() | Data() | EndData():
                with trio.CancelScope(deadline=self._latest()) as scope:
                    self._sending[event.stream_id] = scope
                    try:
                        await super().stream_send(event)
                    finally:
                        self._sending.pop(event.stream_id, None)
                if scope.cancelled_caught:
                    await self._reset(event.stream_id, h2.errors.ErrorCodes.CANCEL)
                    await self._close_stream(event.stream_id)
            case StreamClosed():
                buffer = self.stream_buffers.get(event.stream_id)
                if buffer is not None and _is_closed(self.streams.get(event.stream_id)):
                    buffer.set_complete()  # behind the close frame that answers the client's
                    self.priority.unblock(event.stream_id)
                    await self.has_data.set()
                elif buffer is not None and not buffer.complete:
                    # A truncated answer must not look whole, and the connection's other streams go on.
                    await self._reset(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                await super().stream_send(event)
            case _:
                await super().stream_send(event)

    def _latest(self) -> float:
        return trio.current_time() + self._parser.write_timeout

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None:
            with suppress(MissingStreamError):
                self.priority.remove_stream(stream_id)
            return
        size = len(buffer.buffer)
        with suppress(h2.exceptions.ProtocolError):
            if size and self.connection.local_flow_control_window(stream_id) <= 0:
                # Taking nothing out would let the application write on.
                self.priority.block(stream_id)
                return
        try:
            await super()._send_data(stream_id)
        except KeyError:
            if stream_id in self.stream_buffers:
                raise
            return  # the client has reset it while something of it was being sent
        if len(buffer.buffer) < size and stream_id in self._sending:
            self._sending[stream_id].deadline = self._latest()
        if stream_id not in self.stream_buffers and stream_id in self._unfinished:
            # Answered before the request's end: its rest is not wanted (RFC 9113 section 8.1).
            await self._reset(stream_id, h2.errors.ErrorCodes.NO_ERROR)

    async def _throw_away(self, stream_id: int) -> None:
        """Forget what the client does not want any more: no window is going to be opened for it."""
        if (buffer := self.stream_buffers.pop(stream_id, None)) is not None:
            await buffer.close()
            with suppress(MissingStreamError):
                self.priority.remove_stream(stream_id)

    async def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        """End a stream; the sending task throws away what has not been sent of it."""
        self._unfinished.discard(stream_id)
        with suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, code)
        if (buffer := self.stream_buffers.get(stream_id)) is not None:
            await buffer.close()
            self.priority.unblock(stream_id)
        await self.has_data.set()
        await self._flush()

    async def _close_stream(self, stream_id: int) -> None:
        """Tell the application that it is over: beside everything else, since it may not be listening just now."""
        if (upload := self._uploads.get(stream_id)) is not None:
            upload.changed.set()
            # The connection's window is for all of its streams.
            await self._give_back(stream_id, upload, upload.owed)
        if (stream := self.streams.pop(stream_id, None)) is not None:
            self.task_group.spawn(stream.handle, StreamClosed(stream_id=stream_id))
            await self.has_data.set()
