"""What a proxy adds to the time that an answer takes: open loop, so that a slow answer does not keep the next away.

Requests come at random (Poisson) at the same moments to the upstream itself, to the obvious proxy and to trioproxy, one
after the other, round by round. A request's time counts from the moment at which it was due. What a proxy adds is its
percentile less the upstream's own of the same round; the median of the rounds counts.

    python bench/latency.py --rounds 5 --rate 50
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import trio
from parts import OBVIOUS, OURS, Upstream, ask, running, spread
from results import Figure, add_option, figure, results, save

SECONDS = 6.0
ROUNDS_MAX = 50
RATE_MAX = 500.0


async def times(port: int, arrivals: Sequence[float]) -> list[float]:
    """Seconds from when each request was due to its whole answer, sorted."""
    idle: list[trio.SocketStream] = []
    taken: list[float] = []
    began = trio.current_time() + 0.1

    async def one(due: float) -> None:
        stream = idle.pop() if idle else await trio.open_tcp_stream("127.0.0.1", port)
        await ask(stream, "json")
        taken.append(trio.current_time() - due)
        idle.append(stream)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for arrival in arrivals:
                await trio.sleep_until(began + arrival)
                nursery.start_soon(one, began + arrival)
    for stream in idle:
        await stream.aclose()
    return sorted(taken)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of the sorted values do not exceed, in milliseconds."""
    return 1000 * values[min(int(share * len(values)), len(values) - 1)]


async def measure(rounds: int, rate: float, tell: Callable[[str], object]) -> list[Figure]:
    """Run everything and tell what came of it."""
    upstream, chance, figures = Upstream(), random.Random(1), list[Figure]()
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        extra = ("--concurrency", "64", "--max-queue", "100")
        async with running(OBVIOUS, upstream.url) as obvious, running(OURS, upstream.url, *extra) as ours:
            ports = {"the upstream itself": upstream.port, OBVIOUS: obvious.port, OURS: ours.port}
            taken_by: dict[str, list[list[float]]] = {name: [] for name in ports}
            for number in range(rounds + 1):
                arrivals = [0.0]
                while arrivals[-1] < SECONDS:
                    arrivals.append(arrivals[-1] + chance.expovariate(rate))
                for name, port in ports.items():
                    taken = await times(port, arrivals)
                    taken_by[name] += [taken] if number else []  # the first round warms up
        nursery.cancel_scope.cancel()
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        own, *proxies = taken_by.items()
        alone = [percentile(taken, share) for taken in own[1]]
        figures.append(figure(alone, part="time", what=label, who=own[0], unit="ms"))
        tell(f"{label} of {own[0]}: {spread(alone)} ms, at {rate:g} requests a second")
        for name, rounds_of in proxies:
            added = [percentile(taken, share) - base for taken, base in zip(rounds_of, alone, strict=True)]
            figures.append(figure(added, part="added time", what=label, who=name, unit="ms"))
            tell(f"{label} that {name} adds: {spread(added)} ms")
    return figures


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with all three (%(default)s)")
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second (%(default)g)")
    add_option(parser)
    options = parser.parse_args()
    if not 1 <= options.rounds <= ROUNDS_MAX or not 1 <= options.rate <= RATE_MAX:
        parser.error(f"--rounds: from 1 to {ROUNDS_MAX}; --rate: from 1 to {RATE_MAX:g}")
    save(options.json, results(trio.run(measure, options.rounds, options.rate, print)))


if __name__ == "__main__":
    main()
