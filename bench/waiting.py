"""What waiting costs: resident memory at rest and for each request that waits, 2,000 and 10,000 at once, and the start.

All requests come at once, each on a connection of its own with a body of 1 KB, and stay until the upstream lets them
go. In trioproxy they wait in its queue, in the obvious proxy at the upstream, which is all that it can do.

    python bench/waiting.py --waiting 2000 10000
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from statistics import median

import trio
from parts import OBVIOUS, OURS, Server, Upstream, request, running
from results import Figure, add_option, figure, results, save

KILOBYTES_MAX = 34.0
WAITING_MAX = 20_000
STARTS = 5
ARRIVAL_SECONDS_MAX = 150.0
"""The obvious proxy's pool of connections takes longer for each request the more of them there are."""


async def waiting(server: Server, count: int, upstream: Upstream) -> tuple[float, float]:
    """KB for each of `count` requests that wait; the seconds that it took them all to arrive. Raises TooSlowError."""
    before, streams = server.memory_bytes(), []
    began = trio.current_time()
    with trio.fail_after(ARRIVAL_SECONDS_MAX):
        for _ in range(count):
            stream = await trio.open_tcp_stream("127.0.0.1", server.port)
            await stream.send_all(request("hold"))
            streams.append(stream)
        while (now := server.cpu_seconds()) is not None:
            await trio.sleep(0.5)
            if server.cpu_seconds() - now < 0.02:
                break
    seconds = trio.current_time() - began - 0.5
    kilobytes = (server.memory_bytes() - before) / count / 1000
    upstream.released.set()
    for stream in streams:
        await stream.aclose()
    return kilobytes, seconds


async def started(name: str, tell: Callable[[str], object]) -> list[Figure]:
    """Tell how long the start takes, and what is needed at rest."""
    seconds, memory = [], 0
    for _ in range(STARTS):
        began = trio.current_time()
        async with running(name, "http://127.0.0.1:9/v1") as server:
            seconds.append(trio.current_time() - began)
            memory = server.memory_bytes()
    tell(f"{name:18} starts in {median(seconds):.2f} s, needs {memory / 1e6:.0f} MB at rest")
    rest = Figure(part="start", what="memory at rest", who=name, unit="MB", value=memory / 1e6)
    return [figure(seconds, part="start", what="start", who=name, unit="s"), rest]


async def measured(name: str, count: int) -> tuple[float, float] | None:
    """The same of a server of that name, started for this; None if it took too long."""
    upstream, found = Upstream(), None
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        extra = ("--concurrency", "10", "--max-queue", str(count)) if name == OURS else ()
        async with running(name, upstream.url, *extra) as server:
            with suppress(trio.TooSlowError):
                found = await waiting(server, count, upstream)
        nursery.cancel_scope.cancel()
    return found


async def measure(counts: list[int], tell: Callable[[str], object]) -> list[Figure]:
    """Run everything, and tell what came of it."""
    figures: list[Figure] = []
    for name in (OBVIOUS, OURS):
        figures += await started(name, tell)
    for count in counts:
        for name in (OBVIOUS, OURS):
            if (found := await measured(name, count)) is None:
                tell(f"{name:18} {count:6d} waiting: not all there within {ARRIVAL_SECONDS_MAX:g} s")
                continue
            kilobytes, seconds = found
            mark, what = (None if name == OBVIOUS else KILOBYTES_MAX), f"{count:,} waiting"
            each = Figure(part="memory", what=what, who=name, unit="KB", value=kilobytes, at_most=mark)
            figures.append(each)
            verdict = "" if mark is None else f"; at most {mark:g}: {'ok' if each.good else 'MISSED'}"
            tell(f"{name:18} {count:6d} waiting: {kilobytes:.1f} KB each, all there after {seconds:.1f} s{verdict}")
    return figures


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--waiting", type=int, nargs="+", default=[2_000, 10_000], help="how many wait (%(default)s)")
    add_option(parser)
    options = parser.parse_args()
    if not all(1 <= count <= WAITING_MAX for count in options.waiting):
        parser.error(f"--waiting: from 1 to {WAITING_MAX}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * max(options.waiting) + 100
    if hard != resource.RLIM_INFINITY and hard < needed:
        parser.error(f"--waiting: needs {needed} open files, the limit is {hard} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    found = results(trio.run(partial(measure, options.waiting, print)))
    save(options.json, found)
    sys.exit(not found.good)


if __name__ == "__main__":
    main()
