"""The soak test's upstream: raw sockets, every kind of answer and every kind of fault, and a count of its own.

What it does with a request depends on the seed and on the request's number alone, or on what the request wants.
"""

from __future__ import annotations

import select
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType
from typing import Final

import h11
import trio
from wsproto.utilities import generate_accept_token

RESET: Final = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing sends a reset."""

GONE_SECONDS_MAX: Final = 15.0
"""How long an unanswered call waits for the proxy to give up before that is a complaint."""

PASSED_THROUGH: Final = ("models", "files", "batches", "realtime")

_HANGUP: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_BLOCK: Final = Random(1).randbytes(1 << 21)
"""Bodies are pieces of this."""


@dataclass(eq=False)
class Call:
    """One request and what is said about it."""

    upstream: Upstream
    stream: trio.SocketStream
    chance: Random
    number: int
    method: str
    scheduled: bool
    fields: Mapping[str, str]
    began: float = field(default_factory=trio.current_time)
    treated: str = "its request not read yet"
    """Which behaviour it gets."""
    over: bool = False
    """The answer's last piece is about to be sent, or the connection to be closed: the proxy may free the slot."""
    keep: bool = True
    """Whether the connection is used again."""
    beyond: bytes = b""
    """What came behind the request."""

    @property
    def is_web_socket(self) -> bool:
        """Whether it asks for a WebSocket."""
        return "sec-websocket-key" in self.fields

    async def send(self, data: bytes) -> None:
        """Send something that is not the end."""
        await self.stream.send_all(data)

    async def end(self, data: bytes) -> None:
        """Send the last piece."""
        self.upstream.ended(self)
        await self.stream.send_all(data)

    def close(self, *, reset: bool = False) -> None:
        """Close the connection."""
        self.keep = False
        self.upstream.ended(self)
        if reset:
            self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.stream.socket.close()

    async def pause(self, seconds: float) -> None:
        """Do nothing, for up to so long."""
        await trio.sleep(self.chance.uniform(0, seconds))

    async def wait_for_the_end(self) -> None:
        """Say nothing more: the proxy has to give up."""
        await trio.sleep(GONE_SECONDS_MAX)
        self.upstream.complain(f"a call was not given up within {GONE_SECONDS_MAX:g} s", f"call {self.number}")
        self.close()

    def body(self, low: int, high: int) -> bytes:
        """Some bytes."""
        size = self.chance.randint(low, high)
        start = self.chance.randrange(len(_BLOCK) - size)
        return _BLOCK[start : start + size]

    def head(self, status: int, body: bytes, *fields: str, ends: str = "whole", version: str = "1.1") -> bytes:
        """An answer's head, with what the client needs to judge the answer."""
        lines = [
            f"HTTP/{version} {status} Soak",
            f"X-Soak-Id: {self.number}",
            f"X-Soak-Ends: {ends}",
            f"X-Soak-Body: {len(body)}:{zlib.crc32(body)}",
            *fields,
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def answer(self, status: int, body: bytes, *fields: str) -> None:
        """A whole answer; its last byte by itself."""
        head = self.head(status, body, f"Content-Length: {len(body)}", *fields)
        if self.method == "HEAD" or not body:
            await self.end(head)
            return
        await self.send(head + body[:-1])
        await self.end(body[-1:])


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


CHUNKED: Final = "Transfer-Encoding: chunked"
LAST_CHUNK: Final = b"0\r\n\r\n"


async def small(call: Call) -> None:
    """Most answers."""
    await call.pause(0.06)
    await call.answer(200, call.body(2, 2000), "Content-Type: application/json")


async def large(call: Call) -> None:
    """Up to 1 MB."""
    await call.pause(0.02)
    await call.answer(200, call.body(50_000, 1_000_000))


async def stream(call: Call) -> None:
    """Token by token."""
    pieces = [call.body(10, 3000) for _ in range(call.chance.randint(2, 20))]
    await call.send(call.head(200, b"".join(pieces), CHUNKED, "Content-Type: text/event-stream"))
    for piece in pieces:
        await call.pause(0.03)
        await call.send(chunk(piece))
    await call.end(LAST_CHUNK)


async def trickle(call: Call) -> None:
    """A few bytes at a time."""
    body = call.body(20, 60)
    await call.send(call.head(200, body, f"Content-Length: {len(body)}"))
    for at in range(len(body) - 1):
        await call.send(body[at : at + 1])
        await call.pause(0.04)
    await call.end(body[-1:])


async def flood(call: Call) -> None:
    """More than all buffers on the way take."""
    piece = call.body(65536, 65536)
    pieces = 64
    await call.send(call.head(200, piece * pieces, CHUNKED))
    for _ in range(pieces):
        await call.send(chunk(piece))
    await call.end(LAST_CHUNK)


async def refuse(call: Call) -> None:
    """A whole answer that is an error."""
    await call.pause(0.03)
    status = call.chance.choice([400, 401, 404, 422, 429, 429, 500, 502, 503, 503])
    await call.answer(status, b'{"error": {"message": "no", "code": "soak"}}', "Retry-After: 1")


async def without_body(call: Call) -> None:
    """204 and 304 have none."""
    await call.end(call.head(call.chance.choice([204, 304]), b""))


async def hints_first(call: Call) -> None:
    """Informational answers before the real one."""
    await call.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    await small(call)


async def last_of_connection(call: Call) -> None:
    """An answer that says that the connection closes, and closes it."""
    await call.answer(200, call.body(2, 2000), "Connection: close")
    call.close()


async def closed_unannounced(call: Call) -> None:
    """An answer, and the connection is closed although nobody said so."""
    await small(call)
    await call.pause(0.05)
    call.close()


async def until_closed(call: Call) -> None:
    """A body of no known length, as HTTP/1.0 has it."""
    body = call.body(2, 50_000)
    await call.send(call.head(200, body, version="1.0") + body)
    call.close()


async def hang_up(call: Call) -> None:
    """No answer at all."""
    await call.pause(0.05)
    call.close(reset=call.chance.random() < 0.5)


async def garbage(call: Call) -> None:
    """Something that is not HTTP."""
    await call.end(call.chance.choice([b"\x15\x03\x01\x00\x02", b"SSH-2.0-soak\r\n\r\n", b"HTTP/9 soak\r\n\r\n"]))
    await trio.sleep(0.1)
    call.close()


async def two_lengths(call: Call) -> None:
    """Two lengths that differ."""
    await call.end(call.head(200, b"xx", "Content-Length: 1", "Content-Length: 2") + b"xx")
    await trio.sleep(0.1)
    call.close()


async def switch_protocols(call: Call) -> None:
    """What nobody has asked for."""
    await call.end(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: soak\r\nConnection: Upgrade\r\n\r\n")
    await trio.sleep(0.1)
    call.close()


async def web_socket(call: Call) -> None:
    """A session: refused, closed after some messages, or broken off."""
    chance = call.chance
    if chance.random() < 0.3:
        await call.answer(401, b"no")
        return
    accept = generate_accept_token(call.fields["sec-websocket-key"].encode()).decode()
    fields = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}"
    await call.send(f"HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n\r\n".encode())
    for _ in range(chance.randint(0, 100)):
        await call.send(b"\x82\x7e\x04\x00" + call.body(1024, 1024))
        await call.pause(0.05)
    if chance.random() < 0.5:
        await call.send(b"\x88\x02\x03\xe8")
        await call.pause(0.2)
    call.close(reset=chance.random() < 0.2)


async def huge_head(call: Call) -> None:
    """A head larger than anybody takes."""
    await call.end(call.head(200, b"", *(f"X-Long-{number}: {'x' * 1000}" for number in range(150))))
    await trio.sleep(0.1)
    call.close()


async def too_few(call: Call) -> None:
    """Fewer bytes than were announced."""
    body = call.body(100, 100_000)
    await call.send(call.head(200, body, f"Content-Length: {len(body)}", ends="broken") + body[: len(body) // 2])
    await call.pause(0.05)
    call.close(reset=call.chance.random() < 0.3)


async def cut_off(call: Call) -> None:
    """A stream that ends without its last chunk."""
    body = call.body(10, 5000)
    await call.send(call.head(200, body, CHUNKED, ends="broken") + chunk(body) + b"5\r\nab")
    await call.pause(0.1)
    call.close(reset=call.chance.random() < 0.3)


async def reset_until_closed(call: Call) -> None:
    """A body of no known length that ends with a reset."""
    body = call.body(100, 20_000)
    await call.send(call.head(200, body, version="1.0", ends="broken") + body)
    await trio.sleep(0.05)
    call.close(reset=True)


async def bad_chunk(call: Call) -> None:
    """A stream that turns into nonsense."""
    body = call.body(10, 5000)
    await call.send(call.head(200, body, CHUNKED, ends="broken") + chunk(body))
    await call.pause(0.05)
    await call.end(b"nonsense\r\n")
    await trio.sleep(0.1)
    call.close()


async def stall(call: Call) -> None:
    """A stream that stops, for longer than `idle_timeout`."""
    body = call.body(10, 5000)
    await call.send(call.head(200, body, CHUNKED, ends="broken") + chunk(body))
    await call.wait_for_the_end()


async def never(call: Call) -> None:
    """No answer, and the connection stays."""
    await call.wait_for_the_end()


Behaviour = Callable[[Call], Awaitable[None]]

BEHAVIOURS: Final[Mapping[Behaviour, float]] = MappingProxyType(
    {
        small: 40,
        large: 6,
        stream: 18,
        trickle: 2,
        refuse: 8,
        without_body: 1,
        hints_first: 1,
        last_of_connection: 4,
        closed_unannounced: 3,
        until_closed: 2,
        hang_up: 3,
        garbage: 1.5,
        two_lengths: 1,
        switch_protocols: 0.5,
        huge_head: 0.5,
        too_few: 1.5,
        cut_off: 1.5,
        reset_until_closed: 1,
        bad_chunk: 1,
        stall: 0.7,
        never: 0.7,
    }
)
"""What it does, and how often."""

WANTED: Final = MappingProxyType({"flood": flood, "never": never, "small": small, "stream": stream})
"""What a request can ask for."""


WITHOUT_BODY: Final = frozenset(
    {small, large, refuse, without_body, hints_first, last_of_connection, closed_unannounced, hang_up, garbage, never}
)
"""What fits a HEAD."""


class Upstream:
    """The server and its own books. `complain` is told what the proxy should not have done."""

    def __init__(self, seed: int, complain: Callable[[str, str], None], ended: Callable[[Call], None]) -> None:
        self.port = 0
        self.calls = 0
        self.open: set[Call] = set()
        """Calls that are neither answered nor closed."""
        self.connections = 0
        self.busiest = 0
        """The most scheduled calls that were open at once."""
        self.given_up = 0
        """Calls that the proxy has closed."""
        self.outages = 0
        self.steady = True
        """Whether it can be reached all the time."""
        self.treated: Counter[str] = Counter()
        self.complain = complain
        self._seed = seed
        self._chance = Random(f"{seed}/outages")
        self._tell_ended = ended

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on a port of the loopback interface, with short outages now and then unless `steady`."""
        async with trio.open_nursery() as connections:
            while True:
                listeners = await self._listen()
                with trio.CancelScope() as listening:
                    connections.start_soon(self._have_an_outage, listening)
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    await trio.serve_listeners(self._connection, listeners, handler_nursery=connections)
                self.outages += 1
                await trio.sleep(self._chance.uniform(0.05, 0.4))

    async def _have_an_outage(self, listening: trio.CancelScope) -> None:
        await trio.sleep(self._chance.uniform(8, 20))
        while self.steady:  # noqa: ASYNC110 - looked at now and then
            await trio.sleep(0.1)
        listening.cancel()

    async def _listen(self) -> list[trio.SocketListener]:
        """Below the ports that the kernel gives to clients, so that nobody takes it during an outage."""
        while True:
            port = self.port or self._chance.randrange(15_000, 32_000)
            try:
                listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            except OSError:
                await trio.sleep(0.05)
            else:
                self.port = port
                return listeners

    def ended(self, call: Call) -> None:
        """A call is over."""
        call.over = True
        if call in self.open:
            self.open.discard(call)
            self._tell_ended(call)

    async def _connection(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            beyond: bytes | None = b""
            while beyond is not None:
                beyond = await self._serve_one(stream, beyond)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.connections -= 1
            stream.socket.close()

    async def _serve_one(self, stream: trio.SocketStream, beyond: bytes) -> bytes | None:
        """One call; what came behind it, None if the connection is at its end."""
        parser = h11.Connection(h11.SERVER)
        if beyond:
            parser.receive_data(beyond)
        request = await _next(parser, stream)
        if not isinstance(request, h11.Request):
            return None
        call = self._began(request, stream)
        try:
            if not await self._read_body(call, parser):
                return None
            await self._answer(call)
        finally:
            self.given_up += not call.over
            self.ended(call)
        return call.beyond if call.keep else None

    async def _answer(self, call: Call) -> None:
        """Until the behaviour is done or the proxy closes the connection."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, call, nursery.cancel_scope)
            try:
                await self._behaviour(call)(call)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                call.keep = False
            nursery.cancel_scope.cancel()

    def _began(self, request: h11.Request, stream: trio.SocketStream) -> Call:
        fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers}
        number = int(fields.get("x-soak-id", "-1"))
        target = request.target.decode("latin-1")
        call = Call(
            upstream=self,
            stream=stream,
            chance=Random(f"{self._seed}/call/{number}"),
            number=number,
            method=request.method.decode(),
            scheduled=not target.startswith(tuple(f"/v1/{name}" for name in PASSED_THROUGH)),
            fields=fields,
        )
        if number < 0:
            self.complain("a call without a number", f"{call.method} {target}")
        self.calls += 1
        self.open.add(call)
        if call.scheduled:
            self.busiest = max(self.busiest, sum(_is_running(other) for other in self.open))
        return call

    async def _read_body(self, call: Call, parser: h11.Connection) -> bool:
        """Whether it came to its end."""
        size = checksum = 0
        while True:
            event = await _next(parser, call.stream)
            match event:
                case h11.Data(data):
                    size += len(data)
                    checksum = zlib.crc32(data, checksum)
                case h11.EndOfMessage():
                    break
                case _:
                    return False
        if (expected := call.fields.get("x-soak-body")) != f"{size}:{checksum}":
            self.complain("another body came upstream", f"call {call.number}: {size}:{checksum}, not {expected}")
        if parser.trailing_data[0]:
            self.complain("something came behind a body", f"call {call.number}")
        return True

    def _behaviour(self, call: Call) -> Behaviour:
        wanted = web_socket if call.is_web_socket else WANTED.get(call.fields.get("x-soak-wants", ""))
        behaviour = wanted or call.chance.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]
        if call.method == "HEAD" and behaviour not in WITHOUT_BODY:
            behaviour = small
        call.treated = getattr(behaviour, "__name__", "?")
        self.treated[call.treated] += 1
        return behaviour

    async def _watch(self, call: Call, scope: trio.CancelScope) -> None:
        """Stop when the proxy closes the connection; what comes once the answer is whole is the next call."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await call.stream.receive_some():
                call.beyond += bytes(data)
                if not call.over and not call.is_web_socket:
                    self.complain("something came during an answer", f"call {call.number}: {bytes(data[:200])!r}")
        call.keep = False
        scope.cancel()


def _is_running(call: Call) -> bool:
    """Whether it is a scheduled call that the proxy has not closed: the kernel knows before our task does."""
    if not call.scheduled or call.stream.socket.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(call.stream.socket.fileno(), _HANGUP)
    return not poll.poll(0)


async def _next(parser: h11.Connection, stream: trio.SocketStream) -> object:
    """What comes next; None if the proxy closes before that is whole."""
    try:
        while (event := parser.next_event()) is h11.NEED_DATA:
            parser.receive_data(await stream.receive_some(65536))
    except h11.RemoteProtocolError:
        return None
    return event
