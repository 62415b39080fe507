"""An HTTP/2 client that does exactly what a test says: the protocol's state machine, and frames at will."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.errors
import h2.events
import trio
from wire import PATIENCE

Fields = Sequence[tuple[str, str]]


@dataclass
class Stream:
    """What has come on one stream."""

    status: int | None = None
    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None
    """The error code of a reset."""
    interim: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.ended or self.reset is not None


class Http2Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream, *, window: int, takes: bool) -> None:
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.connection.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.stream = stream
        self.streams: dict[int, Stream] = {}
        self.closed = False
        self.takes = takes
        """Whether what comes is taken, and the windows opened again."""
        self.deaf = False
        """Whether nothing more is read from the socket."""
        self._changed = trio.Event()
        self._flushing = trio.Lock()

    async def begin(self) -> None:
        """Send the preface."""
        self.connection.initiate_connection()
        await self.flush()

    async def flush(self) -> None:
        """Send what the state machine has to send."""
        async with self._flushing:
            if data := self.connection.data_to_send():
                await self.stream.send_all(data)

    async def request(
        self, method: str, path: str, fields: Fields = (), body: bytes | None = None, *, end: bool = True
    ) -> tuple[int, Stream]:
        """Begin a stream; `end`: whether the request ends with this."""
        number = self.connection.get_next_available_stream_id()
        mine = self.streams[number] = Stream()
        pseudo = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "proxy")]
        self.connection.send_headers(number, [*pseudo, *fields], end_stream=end and body is None)
        if body is not None:
            self.connection.send_data(number, body, end_stream=end)
        await self.flush()
        return number, mine

    def begin_stream(self, *fields: tuple[str, str]) -> tuple[int, Stream]:
        """Begin a stream with exactly these fields, pseudo-fields too, and do not send it yet."""
        number = self.connection.get_next_available_stream_id()
        mine = self.streams[number] = Stream()
        self.connection.send_headers(number, fields)
        return number, mine

    async def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Wait until something has come."""
        with trio.fail_after(seconds):
            while not condition() and not self.closed:
                await self._changed.wait()

    async def listen(self) -> None:
        """Take what comes, until the end."""
        while not self.closed:
            while self.deaf:  # noqa: ASYNC110 - whoever made it so does not tell
                await trio.sleep(0.01)
            try:
                data = await self.stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            self.closed = not data
            for event in self.connection.receive_data(data) if data else ():
                self._take(event)
            if not self.closed:
                try:
                    await self.flush()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self.closed = True
            self._changed.set()
            self._changed = trio.Event()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                mine = self.streams[event.stream_id]
                fields = [(str(name), str(value)) for name, value in event.headers]
                mine.status = int(dict(fields)[":status"])
                mine.fields = [pair for pair in fields if not pair[0].startswith(":")]
            case h2.events.InformationalResponseReceived():
                self.streams[event.stream_id].interim.append(
                    next(int(value) for name, value in event.headers if str(name) == ":status")
                )
            case h2.events.DataReceived():
                self.streams[event.stream_id].body += event.data
                if self.takes:
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                self.streams[event.stream_id].ended = True
            case h2.events.StreamReset():
                self.streams[event.stream_id].reset = int(event.error_code)
            case h2.events.ConnectionTerminated():
                self.closed = True
            case _:
                pass


@asynccontextmanager
async def http2_client(port: int, *, window: int = 65535, takes: bool = True) -> AsyncIterator[Http2Client]:
    """A client on a connection by prior knowledge (RFC 9113 section 3.3)."""
    async with trio.open_nursery() as nursery:
        client = Http2Client(await trio.open_tcp_stream("127.0.0.1", port), window=window, takes=takes)
        await client.begin()
        nursery.start_soon(client.listen)
        try:
            yield client
        finally:
            client.stream.socket.close()
            nursery.cancel_scope.cancel()
