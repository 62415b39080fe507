"""Urgent requests among background load: how each proxy treats them before an upstream that serves eight at a time.

Twice as much background as the upstream can serve, and urgent requests beside it. All proxies get the same requests at
the same moments, at the same time, each before an upstream of its own: what is measured are waits of hundreds of
milliseconds and more, beside which they do not disturb one another. The priority is a header; what has no use for it
passes it on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Final

import trio
from parts import OURS, Upstream, call, request
from peer_rounds import percentile
from peer_servers import Found, Target, check, serving
from results import Figure

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "scheduler"))

from ideal import BACKGROUND, URGENT, Arrival, Pool, Stream, Workload, simulate, waits

POOL: Final = Pool(slots=8, places=50)
SERVICE_SECONDS: Final = 1.0
BACKGROUND_LOAD: Final = 2.0
URGENT_LOAD: Final = 0.25
SECONDS: Final = 15.0
PATIENCE_SECONDS: Final = 30.0
"""How long the last urgent requests are waited for."""

HEADERS: Final = {URGENT: {"X-Priority": "critical"}, BACKGROUND: {"X-Priority": "very_low"}}
UPSTREAMS: Final = {"urgent, the upstream queues": True, "urgent, the upstream refuses": False}
"""By part of the results: whether it has a line."""


def workload(seconds: float) -> Workload:
    """Who comes."""
    return Workload(
        name="urgent among twice of what can be served",
        pool=POOL,
        streams=(
            Stream(load=URGENT_LOAD, priorities=(URGENT,), service="uniform", service_seconds=SERVICE_SECONDS),
            Stream(load=BACKGROUND_LOAD, priorities=(BACKGROUND,), service="uniform", service_seconds=SERVICE_SECONDS),
        ),
        seconds=seconds,
    )


@dataclass
class Visits:
    """What became of those who came to one proxy."""

    urgent: int = 0
    urgent_waits: list[float] = field(default_factory=list)
    """Of those who were answered with a 200: the time beyond the service's."""
    background_served: int = 0
    """Until the last of all had come."""
    left: trio.Event = field(default_factory=trio.Event)
    """Once every urgent one has been answered somehow."""


async def come(target: Target, arrivals: Sequence[Arrival], begin: float) -> Visits:
    """All of them, whatever becomes of those before; over with the last urgent answer."""
    visits, idle, waited_for = Visits(), list[trio.SocketStream](), 0
    visits.urgent = sum(arrival.priority == URGENT for arrival in arrivals)
    end = begin + arrivals[-1].at

    async def one(arrival: Arrival) -> None:
        nonlocal waited_for
        milliseconds = round(1000 * arrival.service_seconds)
        stream = idle.pop() if idle else await trio.open_tcp_stream("127.0.0.1", target.port)
        asked = request(f"wait {milliseconds}", {**target.headers, **HEADERS[arrival.priority]})
        try:
            answer = await call(stream, asked)
        except (OSError, trio.BrokenResourceError):
            await stream.aclose()
            status = 0
        else:
            idle.append(stream)
            status = answer.status
        if arrival.priority == URGENT:
            waited_for += 1
            if status == 200:
                visits.urgent_waits.append(answer.ended - begin - arrival.at - milliseconds / 1000)
            if waited_for == visits.urgent:
                visits.left.set()
        elif status == 200 and trio.current_time() <= end:
            visits.background_served += 1

    with trio.move_on_at(end + PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            for arrival in arrivals:
                await trio.sleep_until(begin + arrival.at)
                nursery.start_soon(one, arrival)
            await visits.left.wait()
            nursery.cancel_scope.cancel()
    return visits


async def compare(names: Sequence[str], found: Found, seconds: float, tell: Callable[[str], object]) -> list[Figure]:
    """Both upstreams, one after the other; before each, all proxies at once."""
    figures: list[Figure] = []
    arrivals = workload(seconds).arrivals(seed=1)
    for part, line in UPSTREAMS.items():
        tell(part)
        results = await _at_once(names, found, arrivals, line=line)
        ideal = waits(arrivals, simulate(POOL, arrivals))
        ideally = [ideal[number] for number, each in enumerate(arrivals) if each.priority == URGENT]
        figures += [Figure(part=part, what="mean wait", who="an ideal queue", unit="s", value=fmean(ideally))]
        for name, visits in results.items():
            figures += figures_of(part, name, visits)
    return figures


def figures_of(part: str, name: str, visits: Visits) -> list[Figure]:
    """What is said about one proxy."""
    waited = visits.urgent_waits
    refused = 100 * (visits.urgent - len(waited)) / visits.urgent
    return [
        Figure(part=part, what="refused", who=name, unit="%", value=refused, at_most=0 if name == OURS else None),
        Figure(part=part, what="mean wait", who=name, unit="s", value=fmean(waited) if waited else None),
        Figure(part=part, what="p99 wait", who=name, unit="s", value=percentile(waited, 0.99) if waited else None),
        Figure(part=part, what="background served", who=name, unit="", value=visits.background_served),
    ]


async def _at_once(names: Sequence[str], found: Found, arrivals: Sequence[Arrival], *, line: bool) -> dict[str, Visits]:
    """Each proxy in a task of its own; all of them begin when the last one is ready."""
    results: dict[str, Visits] = {}
    ready, begin = 0, trio.Event()
    extra = ("--concurrency", str(POOL.slots), "--max-queue", str(POOL.places))

    async def one(name: str) -> None:
        nonlocal ready
        upstream = Upstream(POOL.slots, line=line)
        async with trio.open_nursery() as nursery:
            await nursery.start(upstream.serve)
            async with serving(name, found, upstream, extra) as target:
                await check(target)
                ready += 1
                if ready == len(names):
                    begin.set()
                await begin.wait()
                results[name] = await come(target, arrivals, trio.current_time() + 0.5)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(one, name)
    return {name: results[name] for name in names}
