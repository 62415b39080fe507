"""The soak test's clients: every kind of client there is, well behaved and not."""

from __future__ import annotations

import json
import math
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from types import MappingProxyType
from typing import Final

import h11
import trio
from soak_ledger import Expected, Ledger
from soak_upstream import RESET, chunk

PATIENCE_SECONDS: Final = 25.0
"""More than all time limits of the proxy and the slowest answer together."""

CLIENT_SECONDS_MAX: Final = 60.0
CLOSED_SECONDS_MAX: Final = 9.0
"""How long a connection that is of no use may stay open: more than `keep_alive_timeout`."""

BODY_SIZE_MAX: Final = 1 << 20
"""The proxy's `max_body_size`."""

SCHEDULED_PATHS: Final = ("chat/completions", "responses", "embeddings", "completions", "messages", "rerank")
LEVELS: Final = ("very_low", "low", "normal", "high", "critical")
REFUSALS: Final = frozenset({"queue_full", "evicted", "queue_timeout"})
UPSTREAM_ERRORS: Final = frozenset({"upstream_unreachable", "upstream_protocol_error", "upstream_timeout"})


@dataclass(kw_only=True)
class Plan:
    """One request."""

    number: int
    kind: str
    scheduled: bool
    method: str
    path: str
    fields: list[str] = field(default_factory=list)
    body: bytes = b""
    forwarded: bytes = b""
    """The body as the upstream must see it."""
    deadline: bool = False
    version: str = "1.1"
    chunks: int = 0
    """In how many chunks the body is sent; 0 with a Content-Length."""
    codes: frozenset[str] = frozenset()
    """The errors of the proxy that this request may get."""
    refused: str | None = None
    """The error that it must get."""

    def head(self, length: int | None = None) -> bytes:
        """The request's head."""
        lines = [
            f"{self.method} {self.path} HTTP/{self.version}",
            "Host: soak",
            f"X-Request-Id: soak-{self.number}",
            f"X-Soak-Id: {self.number}",
            f"X-Soak-Body: {len(self.forwarded)}:{zlib.crc32(self.forwarded)}",
            *self.fields,
        ]
        if self.chunks:
            lines.append("Transfer-Encoding: chunked")
        elif self.method == "POST":
            lines.append(f"Content-Length: {len(self.body) if length is None else length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def pieces(self) -> list[bytes]:
        """The body as it is sent."""
        if not self.chunks:
            return [self.body]
        size = max(1, math.ceil(len(self.body) / self.chunks))
        return [chunk(self.body[at : at + size]) for at in range(0, len(self.body), size)] + [b"0\r\n\r\n"]

    def encode(self) -> bytes:
        """All of it."""
        return self.head() + b"".join(self.pieces())


@dataclass
class Answer:
    """An answer as far as it came."""

    status: int
    fields: Mapping[str, str]
    size: int = 0
    checksum: int = 0
    start: bytes = b""
    whole: bool = False
    keep: bool = False
    """Whether the connection can be used again."""

    def code(self) -> str | None:
        """The code of the proxy's own error; None if the upstream has answered."""
        if "x-soak-id" in self.fields:
            return None
        try:
            return str(json.loads(self.start)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return "?"


class Wire:
    """A client's connection."""

    def __init__(self, stream: trio.SocketStream, ledger: Ledger) -> None:
        self.stream = stream
        self.numbers: list[int] = []
        """The requests that were sent on it."""
        self.unseen = False
        """The client leaves while the proxy does not read."""
        self._ledger = ledger
        self._rest = b""

    async def send(self, data: bytes) -> bool:
        """Whether it could be sent."""
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def read(self, size: int = 65536) -> bytes:
        """What comes next, b"" at the end, however the connection ends."""
        try:
            return bytes(await self.stream.receive_some(size))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def read_answer(self, method: str, size: int = 65536, pause: float = 0) -> Answer | None:
        """The next answer, as far as it comes; None if nothing does. `size` and `pause` make a slow reader."""
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 18)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "soak")]))
        parser.send(h11.EndOfMessage())
        if self._rest:
            parser.receive_data(self._rest)
        answer: Answer | None = None
        while True:
            try:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    await trio.sleep(pause)
                    parser.receive_data(await self.stream.receive_some(size))
                    continue
            except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                if isinstance(error, h11.RemoteProtocolError) and not parser.trailing_data[1]:
                    self._ledger.complain("nonsense from the proxy", repr(error))
                return answer
            match event:
                case h11.Response():
                    fields = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                    answer = Answer(event.status_code, fields)
                case h11.Data(data) if answer is not None:
                    answer.size += len(data)
                    answer.checksum = zlib.crc32(data, answer.checksum)
                    answer.start = answer.start or bytes(data[:4000])
                case h11.EndOfMessage() if answer is not None:
                    answer.whole = True
                    answer.keep = parser.their_state is h11.DONE
                    self._rest = parser.trailing_data[0]
                    return answer

    async def read_until_closed(self, seconds: float = CLOSED_SECONDS_MAX) -> bool:
        """Whether the connection ends in time."""
        with trio.move_on_after(seconds):
            while await self.read():
                pass
            return True
        return False

    def leave(self, way: str) -> None:
        """Go away."""
        if way == "half-close":
            try:
                self.stream.socket.shutdown(socket.SHUT_WR)
            except OSError:  # the proxy was faster
                way = "close"
        if way == "reset":
            self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if way != "half-close":
            self.stream.socket.close()
        self.note_left(way)

    def note_left(self, way: str) -> None:
        """From now on the upstream must not be working for this client."""
        self._ledger.left(self.numbers, unseen=self.unseen, way=way)


class World:
    """What all clients share."""

    def __init__(self, port: int, seed: int, ledger: Ledger) -> None:
        self.port = port
        self.ledger = ledger
        self.ending = trio.Event()
        """Set while clients that only hang around are to go."""
        self._seed = seed
        self._requests = 0
        self._clients = 0

    async def client(self) -> None:
        """One client of some kind, from its coming to its going."""
        self._clients += 1
        chance = Random(f"{self._seed}/client/{self._clients}")
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        name = getattr(kind, "__name__", "?")
        self.ledger.kinds[name] += 1
        with trio.move_on_after(CLIENT_SECONDS_MAX) as scope:
            await kind(Client(self, chance, name))
        if scope.cancelled_caught:
            self.ledger.complain("a client did not come to its end", f"{name} {self._clients}")

    def next_number(self) -> int:
        """A number that no other request has."""
        self._requests += 1
        return self._requests

    @asynccontextmanager
    async def connect(self, receive_buffer: int = 0) -> AsyncIterator[Wire]:
        """A connection, and the end of it."""
        with trio.socket.socket() as plain:
            if receive_buffer:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            await plain.connect(("127.0.0.1", self.port))
            wire = Wire(trio.SocketStream(plain), self.ledger)
            try:
                yield wire
            finally:
                plain.close()
                wire.note_left("at its end")

    async def hang_around(self, seconds: float) -> None:
        """Do nothing, unless the load is at its end."""
        with trio.move_on_after(seconds):
            await self.ending.wait()


class Client:
    """One client: its chance, and what it needs to make requests and to judge answers."""

    def __init__(self, world: World, chance: Random, kind: str) -> None:
        self.world = world
        self.ledger = world.ledger
        self.chance = chance
        self.kind = kind

    def scheduled(self, *fields: str, size: int | None = None) -> Plan:
        """A request that needs a slot, its priority in its header, its body, both or nowhere."""
        chance = self.chance
        number = chance.choices([0, 10, 30, 50, 70, 90, 100, chance.randrange(101)], [1, 4, 4, 6, 4, 2, 1, 6])[0]
        said = chance.choice([str(number), f'"{number}"', f'"{chance.choice(LEVELS)}"'])
        members = {"model": '"soak"', "stream": chance.choice(["true", "false"])}
        members["input"] = json.dumps("x" * (chance.randint(1, 3000) if size is None else size))
        forwarded = members.copy()
        where = chance.choice(["header", "body", "body", "both", "nowhere"])
        lines = list(fields)
        if where in {"header", "both"}:
            lines.append(f"X-Priority: {said.strip(chr(34))}")
        if where in {"body", "both"}:
            names = list(members)
            names.insert(chance.randrange(len(names) + 1), "priority")
            members = {name: said if name == "priority" else members[name] for name in names}
        return Plan(
            number=self.world.next_number(),
            kind=self.kind,
            scheduled=True,
            method="POST",
            path=f"/v1/{chance.choice(SCHEDULED_PATHS)}{chance.choice(['', '', '?x=1&y=%20'])}",
            fields=lines,
            body=_object(members),
            forwarded=_object(forwarded),
            codes=REFUSALS | UPSTREAM_ERRORS,
        )

    def passed_through(self, method: str = "GET", body: bytes = b"", chunks: int = 0) -> Plan:
        """A request that needs no slot."""
        return Plan(
            number=self.world.next_number(),
            kind=self.kind,
            scheduled=False,
            method=method,
            path=f"/v1/{self.chance.choice(['models', 'files', 'batches'])}{self.chance.choice(['', '/abc', '?a=b'])}",
            body=body,
            forwarded=body,
            chunks=chunks,
            codes=UPSTREAM_ERRORS,
        )

    def any_request(self) -> Plan:
        """A request of one sort or the other."""
        if self.chance.random() < 0.75:
            return self.scheduled()
        return self.passed_through(self.chance.choice(["GET", "GET", "HEAD", "DELETE"]))

    def way(self) -> str:
        """One of the ways in which clients go away."""
        return self.chance.choice(["close", "reset", "half-close"])

    async def send(self, wire: Wire, plan: Plan, *, patient: bool) -> bool:
        """Send a whole request at once; whether it could be."""
        self.note_sent(wire, plan, patient=patient)
        return await wire.send(plan.encode())

    def note_sent(self, wire: Wire, plan: Plan, *, patient: bool) -> None:
        """Enter a request in the books, just before it is whole."""
        wire.numbers.append(plan.number)
        self.ledger.sent[plan.number] = self.kind
        if plan.scheduled and plan.refused is None:
            self.ledger.scheduled_sent += 1
            if patient:
                self.ledger.patient[plan.number] = Expected(plan.kind)

    async def take(self, wire: Wire, plan: Plan, size: int = 65536, pause: float = 0) -> Answer | None:
        """A patient client's answer, judged."""
        answer: Answer | None = None
        with trio.move_on_after(PATIENCE_SECONDS) as scope:
            answer = await wire.read_answer(plan.method, size, pause)
        if scope.cancelled_caught:
            self.ledger.complain("no end of an answer", self._about(plan))
        elif answer is None:
            self.ledger.complain("no answer", self._about(plan))
        else:
            self._judge(plan, answer)
        return answer

    def _about(self, plan: Plan) -> str:
        return f"request {plan.number} ({plan.kind}, {plan.method} {plan.path})"

    def _judge(self, plan: Plan, answer: Answer) -> None:
        code = answer.code()
        self.ledger.answers[code or (str(answer.status) if answer.whole else "broken off")] += 1
        if (expected := self.ledger.patient.get(plan.number)) is not None:
            expected.http_status, expected.code, expected.whole = answer.status, code, answer.whole
        if (said := answer.fields.get("x-trioproxy-request-id")) != f"soak-{plan.number}":
            self.ledger.complain("another request's answer", f"{self._about(plan)}: {said}")
        if complaint := _complaint_of_ours(plan, answer, code) if code else _complaint_of_theirs(plan, answer):
            self.ledger.complain(complaint, f"{self._about(plan)}: {answer}")


def _complaint_of_ours(plan: Plan, answer: Answer, code: str) -> str:
    if not answer.whole:
        return "an error of the proxy is not whole"
    if plan.refused is not None:
        return "" if code == plan.refused else f"{code} instead of {plan.refused}"
    if code == "deadline_exceeded" and plan.deadline:
        return ""
    return "" if code in plan.codes or (plan.method == "HEAD" and answer.status >= 502) else f"unexpected {code}"


def _complaint_of_theirs(plan: Plan, answer: Answer) -> str:
    fields = answer.fields
    if plan.refused is not None:
        return f"forwarded instead of {plan.refused}"
    if fields["x-soak-id"] != str(plan.number):
        return "another call's answer"
    if not answer.whole:
        return "" if fields["x-soak-ends"] == "broken" or plan.deadline else "broken off although it was whole"
    if fields["x-soak-ends"] != "whole":
        return "whole although it was broken off"
    if plan.method == "HEAD" or fields["x-soak-body"] == f"{answer.size}:{answer.checksum}":
        return ""
    return "another body"


def _object(members: Mapping[str, str]) -> bytes:
    return ("{" + ",".join(f'"{name}":{value}' for name, value in members.items()) + "}").encode()


# The kinds. Each is told by its name in the report.


async def patient(client: Client) -> None:
    """One scheduled request, and its answer."""
    async with client.world.connect() as wire:
        plan = client.scheduled()
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def keep_alive(client: Client) -> None:
    """Several requests on one connection, one after the other."""
    async with client.world.connect() as wire:
        for _ in range(client.chance.randint(2, 6)):
            plan = client.any_request()
            await client.send(wire, plan, patient=True)
            answer = await client.take(wire, plan)
            if answer is None or not answer.keep:
                break
            await trio.sleep(client.chance.uniform(0, 0.2))


async def pipelining(client: Client) -> None:
    """Two requests at once, and both answers."""
    async with client.world.connect() as wire:
        plans = [client.scheduled(), client.any_request()]
        for plan in plans:
            client.note_sent(wire, plan, patient=plan is plans[0])
        await wire.send(b"".join(plan.encode() for plan in plans))
        for plan in plans:
            answer = await client.take(wire, plan)
            if answer is None or not answer.keep:
                break


async def pipelining_and_leaving(client: Client) -> None:
    """Two requests at once, and away."""
    async with client.world.connect() as wire:
        wire.unseen = True
        plans = [client.scheduled(), client.any_request()]
        for plan in plans:
            client.note_sent(wire, plan, patient=False)
        await wire.send(b"".join(plan.encode() for plan in plans))
        await trio.sleep(client.chance.expovariate(4))
        await _leave(client, wire, client.way())


async def _leave(client: Client, wire: Wire, way: str) -> None:
    """Go, and see that a half-closed connection is closed from the other side."""
    wire.leave(way)
    if way == "half-close" and not await wire.read_until_closed(6):
        client.ledger.complain("a half-closed connection stayed open", client.kind)


async def leaving_while_sending(client: Client) -> None:
    """Away before the request is whole: it was never there."""
    async with client.world.connect() as wire:
        wire.unseen = True
        plan = client.scheduled(size=client.chance.randint(10, 200_000))
        data = plan.encode()
        await wire.send(data[: client.chance.randrange(1, len(data))])
        await trio.sleep(client.chance.uniform(0, 0.2))
        await _leave(client, wire, client.way())


async def leaving_at_some_time(client: Client) -> None:
    """Away while queued, waiting or streaming, as it comes."""
    async with client.world.connect() as wire:
        await client.send(wire, client.scheduled(), patient=False)
        await trio.sleep(client.chance.expovariate(5))
        await _leave(client, wire, client.way())


async def leaving_while_streaming(client: Client) -> None:
    """Away once the answer has begun."""
    async with client.world.connect() as wire:
        plan = client.scheduled(f"X-Soak-Wants: {client.chance.choice(['stream', 'stream', 'flood', 'any'])}")
        await client.send(wire, plan, patient=False)
        with trio.move_on_after(PATIENCE_SECONDS):
            await wire.read(1000)
        await trio.sleep(client.chance.expovariate(20))
        await _leave(client, wire, client.way())


async def not_reading(client: Client) -> None:
    """Wants a lot and takes nothing, sometimes for longer than the proxy puts up with."""
    async with client.world.connect(receive_buffer=4096) as wire:
        plan = client.scheduled("X-Soak-Wants: flood")
        await client.send(wire, plan, patient=False)
        await client.world.hang_around(client.chance.uniform(0.5, 8))


async def slow_reader(client: Client) -> None:
    """Takes a big answer slowly, and all of it."""
    async with client.world.connect(receive_buffer=32768) as wire:
        plan = client.scheduled(f"X-Soak-Wants: {client.chance.choice(['flood', 'any', 'any'])}")
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan, 32768, client.chance.uniform(0.001, 0.02))


async def slow_sender(client: Client) -> None:
    """Sends its request in pieces, with pauses."""
    async with client.world.connect() as wire:
        plan = client.scheduled(size=client.chance.randint(1000, 300_000))
        data = plan.encode()
        client.note_sent(wire, plan, patient=True)
        step = math.ceil(len(data) / client.chance.randint(2, 20))
        for at in range(0, len(data), step):
            await wire.send(data[at : at + step])
            await trio.sleep(client.chance.uniform(0, 0.15))
        await client.take(wire, plan)


async def big_body(client: Client) -> None:
    """As large as may be."""
    async with client.world.connect() as wire:
        plan = client.scheduled(size=client.chance.randint(200_000, BODY_SIZE_MAX - 200))
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def too_large_a_body(client: Client) -> None:
    """Larger than may be, announced or not."""
    async with client.world.connect() as wire:
        plan = client.scheduled(size=client.chance.randint(BODY_SIZE_MAX, BODY_SIZE_MAX + 500_000))
        plan.chunks = client.chance.choice([0, 30])
        plan.refused = "request_too_large"
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def invalid(client: Client) -> None:
    """No priority, no deadline, no path that means anything."""
    async with client.world.connect() as wire:
        plan = client.scheduled()
        fields, plan.path, plan.refused = client.chance.choice(
            [
                (["X-Priority: 101"], plan.path, "invalid_priority"),
                (["X-Priority: 50.0"], plan.path, "invalid_priority"),
                (["X-Priority: high", "X-Priority: low"], plan.path, "invalid_priority"),
                (["X-Request-Timeout: soon"], plan.path, "invalid_request"),
                ([], "/v1/../admin", "invalid_request"),
                ([], "/v2/chat/completions", "not_found"),
            ]
        )
        plan.fields = [*plan.fields, *fields]
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def invalid_in_body(client: Client) -> None:
    """A priority in the body that is none."""
    async with client.world.connect() as wire:
        plan = client.scheduled()
        plan.fields = []
        said = client.chance.choice(["null", "true", "1.5", '""', "[]", "-1", '"urgent"', "101", "1e1"])
        plan.body = b'{"priority":%b,"model":"soak"}' % said.encode()
        plan.refused = "invalid_priority"
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def with_deadline(client: Client) -> None:
    """In a hurry."""
    async with client.world.connect() as wire:
        plan = client.scheduled(f"X-Request-Timeout: {client.chance.uniform(0.001, 1.5):.3f}")
        plan.deadline = True
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def passed_through(client: Client) -> None:
    """What needs no slot."""
    async with client.world.connect() as wire:
        plan = client.passed_through(client.chance.choice(["GET", "GET", "GET", "HEAD", "DELETE", "OPTIONS"]))
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def passed_through_and_leaving(client: Client) -> None:
    """Away while it is served."""
    async with client.world.connect() as wire:
        await client.send(wire, client.passed_through(), patient=False)
        await trio.sleep(client.chance.expovariate(20))
        await _leave(client, wire, client.way())


async def upload(client: Client) -> None:
    """A body that streams through."""
    async with client.world.connect() as wire:
        body = client.chance.randbytes(client.chance.randint(1, 2_000_000))
        plan = client.passed_through("POST", body, chunks=client.chance.choice([0, 1, 20]))
        client.note_sent(wire, plan, patient=False)
        await wire.send(plan.head())
        for piece in plan.pieces():
            await wire.send(piece)
            await trio.sleep(client.chance.expovariate(100))
        await client.take(wire, plan)


async def leaving_upload(client: Client) -> None:
    """Away in the middle of a body that streams through."""
    async with client.world.connect() as wire:
        wire.unseen = True
        plan = client.passed_through("POST", client.chance.randbytes(200_000), chunks=client.chance.choice([0, 20]))
        client.note_sent(wire, plan, patient=False)
        data = plan.encode()
        await wire.send(data[: client.chance.randrange(len(plan.head()), len(data))])
        await trio.sleep(client.chance.expovariate(10))
        await _leave(client, wire, client.way())


async def http_1_0(client: Client) -> None:
    """As in 1996."""
    async with client.world.connect() as wire:
        plan = client.any_request()
        plan.version = "1.0"
        await client.send(wire, plan, patient=True)
        await client.take(wire, plan)


async def expecting_100(client: Client) -> None:
    """Asks before it sends its body."""
    async with client.world.connect() as wire:
        plan = client.scheduled("Expect: 100-continue")
        client.note_sent(wire, plan, patient=True)
        await wire.send(plan.head())
        await trio.sleep(client.chance.uniform(0, 0.1))
        await wire.send(plan.body)
        await client.take(wire, plan)


async def nonsense(client: Client) -> None:
    """Bytes that are no request of HTTP/1.1; the connection must end."""
    chance = client.chance
    data = chance.choice(
        [
            chance.randbytes(chance.randint(1, 5000)),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500),
            b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
            b"GET /\r\n\r\n",
            b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(50),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABk\r\n\r\n",
            b"POST /v1/respon",
        ]
    )
    async with client.world.connect() as wire:
        await wire.send(data)
        if not await wire.read_until_closed():
            client.ledger.complain("a connection of no use stayed open", repr(data[:100]))


async def silent(client: Client) -> None:
    """Connects, and says nothing."""
    async with client.world.connect() as wire:
        await client.world.hang_around(client.chance.choice([0, 0.1, 1, 3]))
        if client.chance.random() < 0.3 and not await wire.read_until_closed():
            client.ledger.complain("a silent connection stayed open")


async def web_socket(client: Client) -> None:
    """A session: says something now and then, sometimes too early, and leaves with and without a word."""
    chance = client.chance
    fields = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: c29hazEyMzQ1",
    ]
    async with client.world.connect() as wire:
        await client.send(wire, replace(client.passed_through(), path="/v1/realtime", fields=fields), patient=False)
        with trio.move_on_after(chance.expovariate(1)):
            going_on = chance.random() < 0.1 or await wire.read()
            while going_on:
                await wire.send(b"\x81\x85\0\0\0\0hello" * chance.randint(0, 20))
                going_on = await wire.read()
            return
        if chance.random() < 0.5:
            await wire.send(b"\x88\x82\0\0\0\0\x03\xe8")
            await client.world.hang_around(0.2)
        await _leave(client, wire, client.way())


async def operator(client: Client) -> None:
    """Looks how the proxy is."""
    paths = {"/metrics": {200}, "/ready": {200, 503}, "/health": {200}, "/nothing": {404}}
    async with client.world.connect() as wire:
        for path, statuses in paths.items():
            await wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = None
            with trio.move_on_after(5):
                answer = await wire.read_answer("GET")
            if answer is None or answer.status not in statuses or not answer.whole:
                client.ledger.complain("an operator got no answer", f"{path}: {answer}")
                break


Kind = Callable[[Client], Awaitable[None]]

KINDS: Final[Mapping[Kind, float]] = MappingProxyType(
    {
        patient: 24,
        keep_alive: 8,
        pipelining: 2,
        pipelining_and_leaving: 2,
        leaving_while_sending: 3,
        leaving_at_some_time: 10,
        leaving_while_streaming: 3,
        not_reading: 0.7,
        slow_reader: 1,
        slow_sender: 3,
        big_body: 1,
        too_large_a_body: 1,
        invalid: 2,
        invalid_in_body: 1,
        with_deadline: 6,
        passed_through: 8,
        passed_through_and_leaving: 3,
        upload: 2,
        leaving_upload: 1,
        http_1_0: 3,
        expecting_100: 1,
        nonsense: 2,
        silent: 2,
        web_socket: 3,
        operator: 1,
    }
)
"""Who comes, and how often."""
