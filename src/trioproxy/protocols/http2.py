"""HTTP/2 on a client's connection (RFC 9113), by Hypercorn's class and h2."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import h2.errors
import h2.events
import h2.exceptions
import trio
from hypercorn.protocol.events import Body, Data, EndBody, EndData, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from priority.priority import MissingStreamError
from wsproto.connection import ConnectionState

from trioproxy.protocols.parser import PARSER, READ_AS_TEXT, Parser, unusable_version
from trioproxy.request import METHOD

CONNECTION_WINDOW: Final = 1 << 24
"""Bytes of uploads that one HTTP/2 connection may have sent before any of them is taken."""


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
    if fields[b":method"].upper() == b"CONNECT" and (reason := unusable_version(fields)):
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
