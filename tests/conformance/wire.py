"""Both ends of the wire, byte for byte: a client and an upstream that send anything at any time, as a case says.

A *script* is a sequence of steps: bytes to send, something to wait for, a way of ending the connection. Nothing here
knows what HTTP allows, but for `Reply`, which reads an answer as strictly as a client can.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

import trio

PATIENCE: Final = 8.0
"""Seconds that anything which a case waits for may take."""


class End(Enum):
    """How a side leaves its connection."""

    FIN = auto()
    RST = auto()
    HALF = auto()
    """Nothing more is sent, but what comes is still read."""


class Wait(Enum):
    """What a script waits for, from the other side."""

    HEAD = auto()
    """A head, since the last one that was waited for."""
    REQUEST = auto()
    """A whole request, since the last one that was waited for."""
    END = auto()
    """The other side has closed."""


@dataclass(frozen=True)
class Until:
    """Wait until these bytes have come."""

    data: bytes


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Deaf:
    """Read nothing any more, until something is waited for."""


Step = bytes | End | Wait | Until | Pause | Deaf
Script = Sequence[Step]


@dataclass(eq=False)
class Wire:
    """One end of a connection: what has come so far, and how it ended."""

    stream: trio.SocketStream
    received: bytearray = field(default_factory=bytearray)
    ended: str = ""
    """`""` while it is open, then `fin` or `reset`, or `left` if it was this side."""
    taken: int = 0
    """How much of what has come a script has waited for."""
    changed: trio.Event = field(default_factory=trio.Event)
    hearing: trio.Event = field(default_factory=trio.Event)

    async def listen(self) -> None:
        """Take what comes while it is to hear, until the end."""
        while not self.ended:
            await self.hearing.wait()
            try:
                data = await self.stream.receive_some(1 << 20)
            except trio.BrokenResourceError:
                data, self.ended = b"", "reset"
            except trio.ClosedResourceError:
                return
            if not data and not self.ended:
                self.ended = "fin"
            self.received += data
            self.tell()

    def tell(self) -> None:
        """Wake whoever waits for something."""
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what has come fulfils it. TooSlowError if it does not."""
        self.hearing.set()
        with trio.fail_after(PATIENCE):
            while not condition():
                await self.changed.wait()

    async def play(self, script: Script) -> None:
        """Do what a script says. That the other side has gone is no error."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            for step in script:
                await self._do(step)

    async def _do(self, step: Step) -> None:
        match step:
            case bytes():
                await self.stream.send_all(step)
            case Pause(seconds):
                await trio.sleep(seconds)
            case Until(data):
                await self.until(lambda: data in self.received or bool(self.ended))
            case Deaf():
                self.hearing = trio.Event()
            case Wait.END:
                await self.until(lambda: bool(self.ended))
            case Wait():
                measure = head_size if step is Wait.HEAD else request_size
                await self.until(lambda: measure(self._rest()) is not None or bool(self.ended))
                self.taken += measure(self._rest()) or 0
            case End():
                await self.end(step)

    async def end(self, how: End) -> None:
        """Leave."""
        if how is End.HALF:
            await self.stream.send_eof()
            return
        if how is End.RST:
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.stream.aclose()
        self.ended = self.ended or "left"
        self.tell()

    def _rest(self) -> bytes:
        return bytes(self.received[self.taken :])


def head_size(data: bytes) -> int | None:
    """The size of the head at the beginning, None if it is not whole."""
    end = data.find(b"\r\n\r\n")
    return None if end < 0 else end + 4


def request_size(data: bytes) -> int | None:
    """The size of the request at the beginning, None if it is not whole."""
    size = head_size(data)
    if size is None:
        return None
    fields = parse_fields(data[:size])
    if fields.get("transfer-encoding") == "chunked":
        rest = dechunk(data[size:])
        return None if rest is None else size + rest[1]
    size += int(fields.get("content-length", "0"))
    return size if len(data) >= size else None


def parse_fields(head: bytes) -> dict[str, str]:
    """The last value of each field, names in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def dechunk(data: bytes) -> tuple[bytes, int] | None:
    """A chunked body and its size on the wire (RFC 9112 section 7.1), None if it is not whole."""
    body, at = b"", 0
    while True:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            return None
        size = int(data[at:line_end].split(b";")[0], 16)
        at = line_end + 2
        if not size:
            end = data.find(b"\r\n", at)
            return None if end < 0 else (body, end + 2)
        if len(data) < at + size + 2:
            return None
        assert data[at + size : at + size + 2] == b"\r\n", data[at : at + size + 2]
        body, at = body + data[at : at + size], at + size + 2


def chunks_so_far(data: bytes) -> bytes:
    """What can be read of a chunked body that may be cut off."""
    body, at = b"", 0
    while (line_end := data.find(b"\r\n", at)) >= 0 and (size := int(data[at:line_end], 16)):
        body += data[line_end + 2 : line_end + 2 + size]
        at = line_end + 2 + size + 2
    return body


@dataclass(frozen=True)
class Reply:
    """An answer as a client reads it."""

    interim: tuple[int, ...]
    """The statuses 1xx before it."""
    status: int
    head: bytes
    """Status line and fields, without those that identify the request."""
    body: bytes
    whole: bool
    """Whether it was ended properly."""
    size: int
    """How many bytes of the wire it took."""

    @property
    def fields(self) -> dict[str, str]:
        """The last value of each field, names in lower case."""
        return parse_fields(self.head)


IDENTIFICATION: Final = (b"x-request-id: req_", b"x-trioproxy-request-id:", b"server-timing: queue;dur=")


def read_reply(data: bytes, ended: str, method: str = "POST") -> Reply | None:
    """The answer at the beginning of `data`, None if none has begun."""
    interim: list[int] = []
    at = 0
    while True:
        size = head_size(data[at:])
        if size is None:
            return None
        raw = data[at : at + size]
        at += size
        status = int(raw[9:12])
        if status >= 200:
            break
        interim.append(status)
    head = b"\r\n".join(line for line in raw[:-4].split(b"\r\n") if not line.startswith(IDENTIFICATION))
    fields, rest = parse_fields(raw), data[at:]
    if method == "HEAD" or status in (204, 304):
        return Reply(tuple(interim), status, head, b"", True, at)
    if "transfer-encoding" in fields:
        whole = dechunk(rest)
        body, length = whole or (chunks_so_far(rest), len(rest))
        return Reply(tuple(interim), status, head, body, whole is not None, at + length)
    if "content-length" in fields:
        length = int(fields["content-length"])
        return Reply(tuple(interim), status, head, rest[:length], len(rest) >= length, at + min(length, len(rest)))
    return Reply(tuple(interim), status, head, rest, ended == "fin", at + len(rest))


class RawUpstream:
    """An upstream that does on its n-th connection what the n-th script says, and nothing once they are used up."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.wires: list[Wire] = []
        """The connections, in order of arrival."""
        self.url = ""
        self._scripts = list(scripts)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on a free port of the loopback interface."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        task_status.started()
        await trio.serve_listeners(self._connection, listeners)

    @property
    def host(self) -> bytes:
        """The value of `Host` for this upstream."""
        return self.url.removeprefix("http://").removesuffix("/v1").encode()

    @property
    def heard(self) -> list[bytes]:
        """What has come on each connection, the name of this upstream replaced."""
        return [bytes(wire.received).replace(self.host, b"UPSTREAM") for wire in self.wires]

    async def _connection(self, stream: trio.SocketStream) -> None:
        wire = Wire(stream)
        self.wires.append(wire)
        script = self._scripts[len(self.wires) - 1] if len(self.wires) <= len(self._scripts) else ()
        async with trio.open_nursery() as nursery:
            if script[:1] != (Deaf(),):
                wire.hearing.set()
            nursery.start_soon(wire.listen)
            await wire.play(script)


@asynccontextmanager
async def raw_upstream(*scripts: Script) -> AsyncIterator[RawUpstream]:
    """An upstream on a free port, with a script for each connection."""
    upstream = RawUpstream(scripts)
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        try:
            yield upstream
        finally:
            for wire in upstream.wires:
                wire.stream.socket.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def raw_client(port: int) -> AsyncIterator[Wire]:
    """A client's connection to the proxy, listening."""
    async with trio.open_nursery() as nursery:
        wire = Wire(await trio.open_tcp_stream("127.0.0.1", port))
        wire.hearing.set()
        nursery.start_soon(wire.listen)
        try:
            yield wire
        finally:
            wire.stream.socket.close()
            nursery.cancel_scope.cancel()
