"""One round of each comparison with peers: what is asked of a server, and the figures that come of it.

Every function gets a server that answers and returns named figures. Who is compared with whom, and in which order, is
`peers.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from statistics import median
from typing import Final

import trio
from parts import Server, Upstream, ask, request
from peer_servers import Target

Round = Mapping[str, float]
"""Figures by name."""

CPU_CONNECTIONS: Final = 16
CPU_WORKS: Final = (
    ("request, not streamed", "json", 10, 1),
    ("paced chunk, 10 ms apart", "paced 60", 1, 60),
    ("burst chunk", "burst 125", 1, 125),
)
"""Name, kind, requests on each connection, and units of work in each of those."""

SERVICE_MS: Final = 20
LATENCY_REQUESTS: Final = 100
TOKEN_REQUESTS: Final = 40
RATE_CONNECTIONS: Final = 64
RATE_SECONDS: Final = 2.5
RATE_WARM_SECONDS: Final = 1.0
RATE_ANSWERS_MIN: Final = 2 * RATE_CONNECTIONS
"""Slow servers are given longer, until they have answered so many."""

RATE_SECONDS_MAX: Final = 8.0

STREAMS: Final = 100
STREAM_EVENTS: Final = 100
STREAM_PACE_MS: Final = 20
STALL_MS: Final = 5 * STREAM_PACE_MS
STREAM_SECONDS_MAX: Final = 10.0

RECLAIMS: Final = 8
RECLAIM_EVENTS: Final = 10
"""How much of a stream a client sees before it leaves."""

RECLAIM_SECONDS_MAX: Final = 10.0

_numbers: Iterator[int] = count(1)


@asynccontextmanager
async def connections(target: Target, number: int) -> AsyncIterator[list[trio.SocketStream]]:
    """So many connections, closed with the block."""
    streams: list[trio.SocketStream] = []
    try:
        for _ in range(number):
            streams.append(await trio.open_tcp_stream("127.0.0.1", target.port))
        yield streams
    finally:
        for stream in streams:
            stream.socket.close()


async def cpu(target: Target) -> Round:
    """CPU seconds of the server for each unit of work."""
    assert target.server is not None
    used = {}
    for name, kind, requests, units in CPU_WORKS:

        async def client(stream: trio.SocketStream, kind: str = kind, requests: int = requests) -> None:
            for _ in range(requests):
                await ask(stream, kind, target.headers)

        async with connections(target, CPU_CONNECTIONS) as streams:
            for stream in streams:
                await ask(stream, "json", target.headers)
            before = target.server.cpu_seconds()
            with trio.fail_after(120):
                async with trio.open_nursery() as nursery:
                    for stream in streams:
                        nursery.start_soon(client, stream)
            used[name] = (target.server.cpu_seconds() - before) / (CPU_CONNECTIONS * requests * units)
    return used


async def latency(target: Target) -> Round:
    """Seconds for each of many requests, one after the other on one connection."""
    taken = []
    async with connections(target, 1) as [stream]:
        for _ in range(LATENCY_REQUESTS):
            answer = await ask(stream, f"wait {SERVICE_MS}", target.headers)
            taken.append(answer.ended - answer.sent)
    return {"p50 at one connection": median(taken), "p99 at one connection": percentile(taken, 0.99)}


async def first_token(target: Target) -> Round:
    """Seconds until the first event of a stream, one stream after the other on one connection."""
    taken = []
    async with connections(target, 1) as [stream]:
        for _ in range(TOKEN_REQUESTS):
            answer = await ask(stream, f"paced 2 {SERVICE_MS}", target.headers)
            taken.append(answer.events[0] - answer.sent)
    return {"first token, median": median(taken)}


async def rate(target: Target) -> Round:
    """Requests a second, from clients of whom each asks again as soon as it has been answered."""
    answered = 0

    async def client(stream: trio.SocketStream) -> None:
        nonlocal answered
        while True:
            await ask(stream, f"wait {SERVICE_MS}", target.headers)
            answered += 1

    async with connections(target, RATE_CONNECTIONS) as streams, trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(client, stream)
        await trio.sleep(RATE_WARM_SECONDS)
        warm, began = answered, trio.current_time()
        taken = 0.0
        while taken < RATE_SECONDS or (answered - warm < RATE_ANSWERS_MIN and taken < RATE_SECONDS_MAX):
            await trio.sleep(RATE_SECONDS / 10)
            taken = trio.current_time() - began
        counted = answered - warm
        nursery.cancel_scope.cancel()
    await settled(target.server)
    return {"requests a second": counted / taken}


async def streams_without_stall(target: Target) -> Round:
    """The percentage of many streams at once that never stood still for long and came to their end."""
    smooth = 0

    async def client(stream: trio.SocketStream) -> None:
        nonlocal smooth
        answer = await ask(stream, f"paced {STREAM_EVENTS} {STREAM_PACE_MS}", target.headers)
        smooth += 1000 * answer.gap_seconds_max <= STALL_MS

    async with connections(target, STREAMS) as streams:
        with trio.move_on_after(STREAM_SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(client, stream)
                    await trio.sleep(0.005)
    await settled(target.server)
    return {"streams without a stall": 100 * smooth / STREAMS}


async def reclaim(target: Target, upstream: Upstream) -> dict[str, list[float]]:
    """Seconds from a client's leaving until the upstream's connection is closed; infinite if that takes too long."""
    found: dict[str, list[float]] = {"left while streaming": [], "left while waiting": []}

    async def client(kind: str, taken: list[float]) -> None:
        number = next(_numbers)
        stream = await trio.open_tcp_stream("127.0.0.1", target.port)
        await stream.send_all(request(f"{kind} {number}", target.headers))
        with trio.move_on_after(1.0 if kind == "silent" else 3.0):
            received = b""
            while received.count(b"data: ") < RECLAIM_EVENTS:
                received += await stream.receive_some(65536)
        stream.socket.close()
        closed = trio.current_time()
        with trio.move_on_after(RECLAIM_SECONDS_MAX) as waiting:
            await upstream.left[number].wait()
        taken.append(math.inf if waiting.cancelled_caught else trio.current_time() - closed)

    for kind, taken in zip(("stay", "silent"), found.values(), strict=True):
        async with trio.open_nursery() as nursery:
            for _ in range(RECLAIMS):
                nursery.start_soon(client, kind, taken)
                await trio.sleep(0.1)
    return found


async def settled(server: Server | None) -> None:
    """Wait until the server has nothing more to do, for some seconds at most."""
    with trio.move_on_after(10):
        while server is not None:
            before = server.cpu_seconds()
            await trio.sleep(0.2)
            if server.cpu_seconds() - before < 0.02:
                return


def percentile(values: list[float], share: float) -> float:
    """The value that `share` (0 to 1) of the values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
