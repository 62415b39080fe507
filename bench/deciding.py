"""What deciding costs: the scheduler's core alone, and taking a connection among many idle ones.

    python bench/deciding.py

A cycle is: a request comes and queues, another one ends and gives its slot to the first in line, and every tenth cycle
one leaves from the middle of the queue. CPU seconds of this process (time.process_time), not wall clock.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import median

import trio
from parts import OURS
from parts import Upstream as PlainUpstream
from results import Figure, add_option, results, save

from builders import head, scheduled
from trioproxy import errors
from trioproxy.config import UpstreamSettings
from trioproxy.events import Progress, Started
from trioproxy.request import upstream_headers
from trioproxy.scheduler.core import Core
from trioproxy.scheduler.limits import FixedLimit
from trioproxy.upload import Body
from trioproxy.upstream import Upstream

CYCLES = 20_000
CYCLES_PER_SECOND_MIN = 40_000
GROWTH_MAX = 1.5
ACQUIRE_GROWTH_MAX = 1.3
ACQUIRES = 300


def cycles_per_second(queued: int, rounds: int = 3) -> float:
    """Cycles for each CPU second with so many in the queue; the best of some rounds."""
    return max(_cycles_per_second(queued) for _ in range(rounds))


def _cycles_per_second(queued: int) -> float:
    chance = random.Random(1)
    core = Core(FixedLimit(1), queued + 2)
    running = scheduled(50)
    core.submit(running, 0.0)
    waiting = [scheduled(chance.randrange(101)) for _ in range(queued)]
    for request in waiting:
        core.submit(request, 0.0)
    comers = [scheduled(chance.randrange(101)) for _ in range(CYCLES)]
    leaving = chance.sample(waiting, min(CYCLES // 10, queued // 2))
    started = set()
    began = time.process_time()
    for number, request in enumerate(comers):
        core.submit(request, float(number))
        _, event = core.finish(running, float(number), errors.COMPLETED)
        assert isinstance(event, Started)
        running = event.request
        started.add(running)
        if number % 10 == 0 and leaving and (left := leaving.pop()) not in started:
            core.leave(left, float(number), errors.CANCELLED)
    return CYCLES / (time.process_time() - began)


async def acquire_seconds(idle: int) -> float:
    """CPU seconds of one call after the other, client and server side, with so many idle connections beside."""
    server = PlainUpstream()
    asked = head("/v1/chat/completions", [("Content-Length", "2")])
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        upstream = Upstream(UpstreamSettings(base_url=server.url, keep_alive_expiry=600), trust_env=False)
        headers = upstream_headers(asked, host=upstream.host, authorization=None, body_size=2)

        async def call() -> None:
            async with upstream.open("POST", asked.target, headers, Body(b"{}"), Progress()) as response:
                while not response.whole:
                    await response.read()

        async def call_together(count: int) -> None:
            arrived, everybody = 0, trio.Event()

            async def one() -> None:
                nonlocal arrived
                async with upstream.open("POST", asked.target, headers, Body(b"{}"), Progress()) as response:
                    arrived += 1
                    if arrived == count:
                        everybody.set()
                    await everybody.wait()
                    while not response.whole:
                        await response.read()

            async with trio.open_nursery() as callers:
                for _ in range(count):
                    callers.start_soon(one)

        await call_together(idle)
        assert upstream.idle == idle
        began = time.process_time()
        for _ in range(ACQUIRES):
            await call()
        used = (time.process_time() - began) / ACQUIRES
        assert upstream.idle == idle
        await upstream.aclose()
        nursery.cancel_scope.cancel()
    return used


def handed_over(speeds: dict[int, float], costs: dict[int, float]) -> list[Figure]:
    """The figures, for whoever wants to draw them."""
    return [
        *(
            Figure(part="cycles", what=f"{queued:,} queued", who=OURS, unit="for each CPU second", value=speed)
            for queued, speed in speeds.items()
        ),
        *(
            Figure(part="acquire", what=f"{idle:,} idle connections", who=OURS, unit="µs", value=1e6 * cost)
            for idle, cost in costs.items()
        ),
    ]


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_option(parser)
    options = parser.parse_args()
    speeds = {queued: cycles_per_second(queued) for queued in (1, 1_000, 100_000)}
    growth = speeds[1_000] / speeds[100_000]
    good = min(speeds[1], speeds[1_000]) >= CYCLES_PER_SECOND_MIN and growth <= GROWTH_MAX
    for queued, speed in speeds.items():
        print(f"{queued:7d} queued: {speed:9,.0f} cycles for each CPU second")
    print(
        f"  at least {CYCLES_PER_SECOND_MIN:,}; 100,000 cost {growth:.2f} times as much as 1,000, at most {GROWTH_MAX}"
    )
    costs = {idle: median(trio.run(acquire_seconds, idle) for _ in range(3)) for idle in (1, 100, 300, 1_000)}
    for idle, cost in costs.items():
        print(f"{idle:7d} idle connections: {1e6 * cost:6.0f} µs for one call, {cost / costs[1]:.2f} times as with one")
    save(options.json, results(handed_over(speeds, costs)))
    good &= costs[1_000] / costs[1] <= ACQUIRE_GROWTH_MAX
    print(f"  at most {ACQUIRE_GROWTH_MAX} times; {'ok' if good else 'MISSED'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
