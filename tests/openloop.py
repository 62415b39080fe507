"""Declared load on real sockets: clients who come when the workload says, an upstream that takes as long as it says.

What the two of them write down, held against the ideal pool with the same arrivals and service times, shows what the
proxy between them adds. Clients and upstream are as simple as can be, so that they add little themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import trio
from ideal import Arrival, Interval, Pool, busy_share, simulate, waits

ANSWER: Final = b'{"object": "chat.completion"}'
HEAD_END: Final = b"\r\n\r\n"
RECEIVE_MAX: Final = 65536


@dataclass(slots=True)
class Visit:
    """What became of one customer. Times are readings of trio's clock."""

    arrival: Arrival
    sent: float = math.nan
    answered: float = math.nan
    """When the whole answer had been read."""
    status: int = 0
    queue_seconds: float = 0.0
    """How long it waited for a slot, by the proxy's own account (`server-timing`)."""
    served: Interval | None = None
    """From when to when it was at the upstream."""

    @property
    def service_seconds(self) -> float:
        """How long the upstream really took; if it was never asked, how long it would have."""
        return self.arrival.service_seconds if self.served is None else self.served[1] - self.served[0]

    @property
    def lateness_seconds(self) -> float:
        """How much longer than it was told the upstream took: what this machine cannot help."""
        return self.service_seconds - self.arrival.service_seconds

    @property
    def overhead_seconds(self) -> float:
        """What the answer took longer than the service: waiting and transit."""
        return self.answered - self.sent - self.service_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The proxy beside the ideal, for the urgent ones of a run."""

    urgent: int
    urgent_refused: int
    transit_seconds: float
    """The median overhead without load, taken off from each wait."""
    wait_seconds_mean: float
    ideal_wait_seconds_mean: float
    wait_seconds_median: float
    ideal_wait_seconds_median: float
    own_wait_seconds_mean: float
    """The wait by the proxy's own account."""
    others_served: int
    ideal_others_served: int
    busy_share: float
    """Of the slots, at the upstream, while anybody waits in the proxy."""

    @property
    def ratio(self) -> float:
        """The mean wait, in ideal ones."""
        return self.wait_seconds_mean / self.ideal_wait_seconds_mean


class TimedUpstream:
    """A server that answers each request after the time that its header `X-Service` says."""

    def __init__(self) -> None:
        self.url = ""
        self.served: dict[str, Interval] = {}
        """From when to when each was here, by `X-Customer`; in the order of their coming."""
        self.at_once = 0
        self.at_once_max = 0
        self.came: dict[str, float] = {}

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on a free port of the loopback interface."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        task_status.started()
        await trio.serve_listeners(self._connection, listeners)

    async def _connection(self, stream: trio.SocketStream) -> None:
        messages = Messages(stream)
        try:
            while (message := await messages.next()) is not None:
                await self._answer(stream, message.fields)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _answer(self, stream: trio.SocketStream, fields: dict[str, str]) -> None:
        came = trio.current_time()
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        self.came[fields["x-customer"]] = came
        try:
            await trio.sleep_until(came + float(fields["x-service"]))
        finally:
            self.at_once -= 1
            self.served[fields["x-customer"]] = (came, trio.current_time())
        await stream.send_all(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
        )


@dataclass(frozen=True, slots=True)
class Message:
    """The head of a request or of an answer; its body has been read."""

    start: str
    fields: dict[str, str]
    """By name in lower case."""


class Messages:
    """The HTTP/1.1 messages, each with a `Content-Length` or without a body, that come on a connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def next(self) -> Message | None:
        """The next one, None at the connection's end."""
        while HEAD_END not in self._buffer:
            if not await self._receive():
                return None
        head, _, self._buffer = self._buffer.partition(HEAD_END)
        start, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert "transfer-encoding" not in fields
        length = int(fields.get("content-length", "0"))
        while len(self._buffer) < length:
            if not await self._receive():
                return None
        self._buffer = self._buffer[length:]
        return Message(start, fields)

    async def _receive(self) -> bool:
        data = await self._stream.receive_some(RECEIVE_MAX)
        self._buffer += data
        return bool(data)


@dataclass
class Clients:
    """All customers, each with a connection of its own for as long as it is there. Connections are used again."""

    port: int
    upstream: TimedUpstream
    _idle: list[tuple[trio.SocketStream, Messages]] = field(default_factory=list)
    _numbers: int = 0

    async def visit(self, arrival: Arrival) -> Visit:
        """One customer comes now and stays until it has been answered."""
        visit = Visit(arrival)
        stream, messages = self._idle.pop() if self._idle else await self._connect()
        self._numbers += 1
        customer = str(self._numbers)
        request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
            f"X-Priority: {arrival.priority}\r\nX-Customer: {customer}\r\nX-Service: {arrival.service_seconds:.6f}\r\n"
            f'Content-Length: 14\r\n\r\n{{"model": "m"}}'
        ).encode()
        visit.sent = trio.current_time()
        await stream.send_all(request)
        answer = await messages.next()
        visit.answered = trio.current_time()
        if answer is None:
            raise ConnectionError("the proxy has closed the connection")
        self._idle.append((stream, messages))
        visit.status = int(answer.start.split(" ")[1])
        visit.queue_seconds = float(answer.fields["server-timing"].partition("dur=")[2]) / 1000
        visit.served = self.upstream.served.get(customer)
        return visit

    async def come(self, arrivals: Sequence[Arrival]) -> list[Visit]:
        """All customers come when they are to, whatever becomes of those before (an open loop)."""
        visits: list[Visit] = []
        begin = trio.current_time() + 0.05

        async def one(arrival: Arrival) -> None:
            visits.append(await self.visit(arrival))

        async with trio.open_nursery() as nursery:
            for arrival in arrivals:
                await trio.sleep_until(begin + arrival.at)
                nursery.start_soon(one, arrival)
        return visits

    async def transit_seconds(self, samples: int = 50) -> float:
        """The median overhead of requests that come one at a time, once everything is warm."""
        one = Arrival(at=0.0, priority=50, service_seconds=0.01)
        overheads = [(await self.visit(one)).overhead_seconds for _ in range(2 * samples)]
        return statistics.median(overheads[samples:])

    async def open(self, connections: int) -> None:
        """Open so many connections, all the way to the upstream as far as there are slots."""
        await self.come([Arrival(at=0.0, priority=50, service_seconds=0.05)] * connections)

    def close(self) -> None:
        """Close all connections."""
        for stream, _ in self._idle:
            stream.socket.close()

    async def _connect(self) -> tuple[trio.SocketStream, Messages]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        return stream, Messages(stream)


def figures(pool: Pool, visits: Sequence[Visit], urgent_priority: int, transit_seconds: float) -> Figures:
    """Hold a run against the ideal pool with the arrivals and service times as they really were."""
    visits = sorted(visits, key=lambda visit: visit.sent)
    real = [replace(visit.arrival, at=visit.sent, service_seconds=visit.service_seconds) for visit in visits]
    steps = simulate(pool, real)
    ideal = waits(real, steps)
    urgent = [number for number, visit in enumerate(visits) if visit.arrival.priority == urgent_priority]
    waited = [visits[number].overhead_seconds - transit_seconds for number in urgent if visits[number].status == 200]
    ideally = [ideal[number] for number in urgent if number in ideal]
    served = [visit.served for visit in visits if visit.served is not None]
    waiting = [(visit.sent, visit.sent + visit.queue_seconds) for visit in visits if visit.queue_seconds]
    return Figures(
        urgent=len(urgent),
        urgent_refused=len(urgent) - len(waited),
        transit_seconds=transit_seconds,
        wait_seconds_mean=statistics.fmean(waited),
        ideal_wait_seconds_mean=statistics.fmean(ideally),
        wait_seconds_median=statistics.median(waited),
        ideal_wait_seconds_median=statistics.median(ideally),
        own_wait_seconds_mean=statistics.fmean(visits[number].queue_seconds for number in urgent),
        others_served=len(served) - len(waited),
        ideal_others_served=len(ideal) - len(ideally),
        busy_share=busy_share(served, waiting, pool.slots),
    )
